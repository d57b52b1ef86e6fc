import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# seconds of one core that the longest tests take, all their cases and fixtures together; a case of the others: 0.5
SECONDS = {
    "test_away": dict(a_step_runs_on_an_accelerator_without_waiting_for_it=40),
    "test_dinov2": dict(it_learns=32, official_checkpoint_in_features_and_pictures_out=12,
                        two_ranks_are_one_process=11),
    "test_faults": dict(cheap_faults_on_one_script=26),
    "test_leaderboard": dict(a_cell_of_the_table=22),
    "test_llip": dict(llip_learns=22, bad_shards_are_named_and_limited=4, overfits_a_few_pairs=5),
    "test_mvp_eval": dict(a_function_that_looks_is_perfect_and_one_that_sees_half_gets_nothing=11,
                          kill_and_resume_loses_nothing_and_repeats_nothing=13),
    "test_pixel_vit": dict(classifier_learns=20, diffusion_learns=19, mae_learns=14, two_ranks_are_one_process=10),
    "test_runs": dict(corrupt_images_are_skipped_counted_and_limited=28, flexpredict_learns=48, ijepa_learns=60,
                      iwm_learns=40, kill_and_resume_is_bitwise=70, msn_learns=60, two_ranks_are_one_process=75,
                      pmsn_moves_cluster_sizes_to_the_prior_it_is_given=20),
    "test_vjepa": dict(vjepa_learns=25),
}  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """PART=1/2 runs the first of two parts that take about the same time, so that two processes can share the tests.

    The longest function first, each goes to the part that has least so far; its cases stay together, for they share
    fixtures.
    """
    part, parts = map(int, os.environ.get("PART", "1/1").split("/"))
    seconds = Counter()
    for item in items:
        name = item.function.__name__.removeprefix("test_")
        known = SECONDS.get(item.function.__module__, {}).get(name)
        seconds[item.function] = known or seconds[item.function] + 0.5
    loads, chosen = [0.0] * parts, {}
    for function, expected in seconds.most_common():
        chosen[function] = loads.index(min(loads))
        loads[chosen[function]] += expected
    config.hook.pytest_deselected(items=[item for item in items if chosen[item.function] != part - 1])
    items[:] = [item for item in items if chosen[item.function] == part - 1]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, so that nothing reads or writes ./data and ./runs of the checkout."""
    monkeypatch.chdir(tmp_path)
