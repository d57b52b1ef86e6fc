"""iwm.py against the numbers of its specification (tests/golden/iwm: there is no official code) and its own promises.

What it shares with ijepa.py byte for byte is tested there; what all scripts promise, in test_runs.py.
"""

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import ijepa
import iwm
from iwm import Config, World

GOLDEN = Path(__file__).parent / "golden" / "iwm"
ALONE = World(0, 1, torch.device("cpu"))
TINY = dict(image_size=24, patch=4, width=16, depth=2, heads=2, predictor_width=12, predictor_depth=3)
SMALL = "--width 16 --depth 2 --heads 2 --predictor-width 16 --predictor-depth 2 --batch 16 --device cpu".split()
SMALL += "--no-compile --log-every 1".split()


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=None):
    return torch.from_numpy(np.asarray(array)).to(dtype or torch.float64)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    torch.testing.assert_close(torch.as_tensor(actual).detach().double(), tensor(expected), atol=atol, rtol=rtol)


def tiny(conditioning="feature", dtype=torch.float32):
    """(model, target) with the weights of the tiny checkpoint."""
    model, target = iwm.build(Config(**TINY, predictor_heads=3, conditioning=conditioning))
    path = GOLDEN / "tiny_iwm.pt"
    iwm.load_weights(model, target, iwm.read_checkpoint(path, heads=2), path)
    return model.to(dtype), target.to(dtype)


def log_rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("conditioning", ["feature", "sequence", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward(conditioning, dtype):
    g = golden("forward")
    model, target = tiny(conditioning, dtype)
    x, y, action = (tensor(g[k], dtype) for k in ("x", "y", "action"))
    keep, mask = tensor(g["keep"], torch.long), tensor(g["mask"], torch.long)
    patches = model.encoder.patch_embed.patchify(x)
    close(model.encoder(patches, keep=keep), g["z_x"], atol=1e-5)
    tokens = target(y)
    close(tokens, g["z_y"], atol=1e-5)
    predictions = model(patches, keep, mask, action)
    close(predictions, g[f"pred_{conditioning}"], atol=1e-5)
    if conditioning != "feature":
        return
    close(model.predictor.everywhere(tokens, torch.zeros(1, 7, dtype=dtype)), g["ft_tokens"], atol=1e-5)
    picked = common.old_gather_tokens(tokens, mask)
    kinds = dict(l2_sum=dict(reduction="sum", target_norm=False), l2_mean=dict(target_norm=False), l2_mean_ln={},
                 smoothl1_ln=dict(loss="smooth_l1"))  # fmt: skip
    for name, fields in kinds.items():
        config = Config(**fields)
        loss = iwm.iwm_loss(predictions, iwm.norm_tokens(picked, config), config)
        close(loss, g[f"loss_{name}"], rtol=1e-5)


@pytest.mark.parametrize("kind", ["l2_sum", "l2_mean_ln"])
def test_gradients_along_given_directions(kind):
    """In float64, as the loss works in float32: gradients of its formula there, and of the loss itself beside it."""
    g = golden("forward")
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        model, target = tiny(dtype=dtype)
        keep, mask = tensor(g["keep"], torch.long), tensor(g["mask"], torch.long)
        patches = model.encoder.patch_embed.patchify(tensor(g["x"], dtype))
        predictions = model(patches, keep, mask, tensor(g["action"], dtype))
        targets = common.old_gather_tokens(target(tensor(g["y"], dtype)), mask).detach()
        config = Config(reduction="sum", target_norm=False) if kind == "l2_sum" else Config()
        if dtype == torch.float64:
            if config.target_norm:
                targets = torch.nn.functional.layer_norm(targets, targets.shape[-1:])
            error = (predictions - targets).square()
            loss = error.sum() / len(error) if kind == "l2_sum" else error.mean()
        else:
            loss = iwm.iwm_loss(predictions, iwm.norm_tokens(targets, config), config)
        loss.backward()
        parts = {"pr": dict(model.predictor.named_parameters()), "enc": dict(model.encoder.named_parameters())}
        keys = [k for k in g.files if k.startswith("dir:")]
        assert len(keys) == 8
        for key in keys:
            _, part, name = key.split(":")
            gradient, direction = parts[part][name].grad.double(), tensor(g[key])
            scale = gradient.norm().item() * direction.norm().item()  # what cancels in the sum
            expected = float(g[f"dd_{kind}:{part}:{name}"])
            assert (gradient * direction).sum().item() == pytest.approx(expected, rel=tolerance, abs=1e-6 * scale)


def test_actions():
    g = golden("actions")
    source, target, flags = (tensor(g[k]) for k in ("source_jitter", "target_jitter", "flags"))
    close(iwm.make_action(source, target, flags), g["action"], atol=1e-12)
    ratio = iwm.make_action(source, target, flags, "ratio")
    close(ratio[:, :3].exp() * source[:, :3], g["target_jitter"][:, :3], rtol=1e-12)
    middle = torch.tensor([[0.7, 1.2, 0.9, 0.1]]).double().expand(12, 4)
    steps = [iwm.make_action(*pair, flags * 0, "ratio") for pair in ((source, middle), (middle, target))]
    torch.testing.assert_close(sum(steps), iwm.make_action(source, target, flags * 0, "ratio"))


def test_photometric_operations():
    g = golden("photometric")
    image = tensor(g["image"], torch.float32)[None]
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        theta = torch.tensor([iwm.NEUTRAL])
        theta[0, i] = float(g["factors"][i])
        close(iwm.jitter(image, theta)[0], g[name], atol=1e-5)
    close(iwm.jitter(image, tensor(g["factors"], torch.float32)[None])[0], g["chain_bcsh"], atol=1e-5)
    close(iwm.luma(image)[0].expand(3, -1, -1), g["grayscale"], atol=1e-5)
    close(iwm.solarize(image)[0], g["solarize"], atol=1e-5)
    torch.testing.assert_close(iwm.jitter(image, torch.tensor([iwm.NEUTRAL])), image, atol=1e-6, rtol=0)


def test_blur_is_a_gaussian_with_reflected_borders():
    image = torch.rand(2, 3, 15, 20, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.tensor([0.4, 1.5]).double()
    padded = torch.nn.functional.pad(image, (5, 5, 5, 5), mode="reflect")
    line = torch.arange(-5, 6).double()
    for i in range(2):
        kernel = torch.exp(-(line**2) / (2 * sigma[i] ** 2))
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
        expected = torch.nn.functional.conv2d(padded[i][:, None], kernel[None, None])[:, 0]
        torch.testing.assert_close(iwm.gaussian_blur(image, sigma, 5)[i], expected)


def test_mrr():
    g = golden("mrr")
    predictions, bank, true = tensor(g["pred"]), tensor(g["bank"]), tensor(g["target"], torch.long)
    distances = torch.cat([iwm.squared_distances(p[None], b) for p, b in zip(predictions, bank)])
    close(distances, g["dist2"], rtol=1e-9)
    found = iwm.ranks(distances, true)
    np.testing.assert_array_equal(found, g["rank"])
    close((1 / found.double()).mean(), g["mrr"], rtol=1e-12)
    cosine = 1 - torch.nn.functional.cosine_similarity(predictions[:, None].flatten(2), bank.flatten(2), dim=-1)
    np.testing.assert_array_equal(iwm.ranks(cosine, true), g["rank_cosine"])
    close((1 / iwm.ranks(cosine, true).double()).mean(), g["mrr_cosine"], rtol=1e-12)
    bank[0, (true[0] + 1) % 16] = bank[0, true[0]]
    distances = torch.cat([iwm.squared_distances(p[None], b) for p, b in zip(predictions, bank)])
    np.testing.assert_array_equal(iwm.ranks(distances, true), g["tie_rank"])
    assert iwm.ranks(torch.tensor([[0.9, 0.2, 0.5, 0.2]]), torch.tensor([2])).tolist() == [3]
    assert sum(1 / k for k in range(1, 257)) / 256 == pytest.approx(float(g["chance256"]))


def test_masks_have_the_golden_statistics():
    g = golden("masks")
    config = Config(image_size=224, patch=16, masks="official", batch=20)
    sizes = [iwm.block_size((i + 0.5) / 20000, 14, config.block_scale, config.block_aspect) for i in range(20000)]
    found, counts = np.unique(sizes, axis=0, return_counts=True)
    expected = {tuple(size): p for size, p in zip(g["block_sizes"].tolist(), g["block_probs"])}
    assert {tuple(size) for size in found.tolist()} == set(expected)
    for size, count in zip(found.tolist(), counts):
        assert abs(count / 20000 - expected[tuple(size)]) < 0.02
    hidden = torch.cat([iwm.hidden_patches(config, step) for step in range(1000)])
    assert abs(hidden.sum(1).double().mean() - float(g["union_mean"])) < 0.01 * 196
    assert abs(hidden.sum(1).double().std() - float(g["union_std"])) < 0.01 * 196
    assert (hidden.double().mean(0).view(14, 14) - tensor(g["mask_freq"])).abs().max() < 0.03
    histogram = hidden.sum(1).bincount(minlength=197).double() / len(hidden)
    assert (histogram.cumsum(0) - tensor(g["union_hist"]).cumsum(0) / g["union_hist"].sum()).abs().max() < 0.05


# ------------------------------------------------------------------------------------------------------------ views


def test_views_differ_only_in_what_the_action_says():
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    off = Config(jitter_share=0.0, grey=0.0, blur=0.0, solarize=0.0, batch=8)
    x, y, action = iwm.make_pair(images, iwm.step_views(off, 0, 0, 8), off)
    assert torch.equal(x, y) and not action.any()
    torch.testing.assert_close(iwm.to_pixels(y) / 255, images, atol=1e-5, rtol=0)
    config = Config(batch=8, grey=1.0, jitter_share=0.0, blur=0.0, solarize=0.0)
    x, y, action = iwm.make_pair(images, iwm.step_views(config, 0, 0, 8), config)
    assert iwm.to_pixels(x).std(1).max() < 1e-3 < iwm.to_pixels(y).std(1).max() and action[:, 4].all()
    assert action.sum() == 8
    config = Config(batch=8, jitter_share=1.0, grey=0.0, blur=0.0, solarize=0.0)
    views = iwm.step_views(config, 3, 0, 8)
    x, y, action = iwm.make_pair(images, views, config)
    torch.testing.assert_close(views["source"] + action[:, :4], views["target"])
    torch.testing.assert_close(iwm.to_pixels(y) / 255, iwm.jitter(images, views["target"]), atol=1e-5, rtol=0)


def test_draws_follow_the_settings_and_not_who_draws():
    config = Config(batch=4000, jitter=(0.4, 0.3, 0.2, 0.1))
    views = iwm.step_views(config, 5, 0, 4000)
    for name in ("source", "target"):
        applied = (views[name] != torch.tensor(iwm.NEUTRAL)).any(1)
        assert abs(applied.float().mean() - 0.8) < 0.03
        spread = (views[name][applied] - torch.tensor(iwm.NEUTRAL)).abs()
        assert (spread.amax(0) <= torch.tensor(config.jitter) + 1e-6).all()
        torch.testing.assert_close(spread.mean(0), torch.tensor(config.jitter) / 2, rtol=0.05, atol=0)
    assert (views["source"][:, 0] - 1).dot(views["target"][:, 0] - 1).abs() / 4000 < 0.004, "drawn together"
    torch.testing.assert_close(views["flags"].mean(0), torch.tensor([0.2, 0.2, 0.1]), atol=0.025, rtol=0)
    part = iwm.step_views(config, 5, 1000, 1400)
    assert all(torch.equal(part[k], views[k][1000:1400]) for k in views)
    assert not torch.equal(iwm.step_views(config, 6, 0, 4000)["target"], views["target"])


def test_masks_do_not_depend_on_who_asks():
    config = Config(batch=64, image_size=32, patch=4, seed=3)
    keep, mask = iwm.sample_masks(config, 7)
    hidden = iwm.hidden_patches(config, 7)
    assert not hidden.gather(1, keep).any() and hidden.gather(1, mask).all()
    assert keep.shape[1] == (~hidden).sum(1).min() and mask.shape[1] == hidden.sum(1).min()
    assert (keep.diff(dim=1) > 0).all() and (mask.diff(dim=1) > 0).all()
    for first, last in ((0, 32), (32, 64), (20, 23)):
        part = iwm.sample_masks(config, 7, first, last)
        assert torch.equal(part[0], keep[first:last]) and torch.equal(part[1], mask[first:last])
    halves = iwm.micro_batch_masks(replace(config, accumulate=2), 7, 32, 64, ALONE)
    assert torch.equal(torch.cat([k for k, _ in halves]), keep[32:]) and len(halves) == 2
    assert not torch.equal(iwm.sample_masks(replace(config, seed=4), 7)[1][:, :3], mask[:, :3])
    cover = torch.stack([iwm.hidden_patches(config, step).float().mean(0) for step in range(60)]).mean(0).view(8, 8)
    assert cover[-1].min() > 0 and abs(cover[:4].sum() / cover.sum() - 0.5) < 0.03, "corrected masks reach the border"


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_i_jepa_checkpoints_are_an_unconditioned_start():
    """Official and ijepa.py's own: the same predictions as I-JEPA's predictor makes of one block."""
    g = np.load(GOLDEN.parent / "ijepa" / "forward.npz")
    path = GOLDEN.parent / "ijepa" / "tiny_ijepa.pth.tar"
    model, target, config = iwm.load_model(path, heads=2)
    assert config.conditioning == "none" and (config.width, config.predictor_depth) == (12, 2)
    images = tensor(g["imgs_q"], torch.float32) / 16
    patches = target.patch_embed.patchify(images)
    masks_context, masks_target = (tensor(g[f"masks_{k}"], torch.long) for k in ("enc", "pred"))
    blocks = [model(patches, masks_context[0], mask, torch.rand(len(images), 7)) for mask in masks_target]
    close(torch.cat(blocks), g["pred_out"], atol=1e-5)
    flags = "--steps 1 --eval none --batch 16 --device cpu --no-compile --lr 0 --lr-start 0 --lr-final 0".split()
    small = "--width 16 --depth 2 --heads 2 --predictor-width 8 --predictor-depth 2 --predictor-heads 2".split()
    ijepa.main([*small, *flags, "--out", "start"])
    ours = iwm.load_model("start/last.pt")[0]
    theirs = torch.load("start/last.pt", weights_only=True)["model"]
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.items())
    iwm.main(["--init", "start/last.pt", "--conditioning", "feature", *flags, "--out", "conditioned"])
    state = torch.load("conditioned/last.pt", weights_only=True)
    assert torch.equal(state["model"]["predictor.mask_token"], theirs["predictor.mask_token"])
    assert "predictor.cond.0.weight" in state["model"] and state["config"]["conditioning"] == "feature"
    assert iwm.read_checkpoint("conditioned/last.pt")["architecture"]["conditioning"] == "feature"


# ------------------------------------------------------------------------------------------------------- evaluation


def test_ranking_finds_a_perfect_world_model():
    """A model that returns exactly the transformed latent has MRR 1, told another's action it has chance."""
    config = Config(mrr_bank=32, mrr_actions=8, image_size=16, patch=4)
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))

    def encoder(x):
        return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)

    class Perfect:
        """Pixels as latents, so that it can do to them what the action says."""

        def __init__(self):
            self.encoder, self.predictor = encoder, self

        def everywhere(self, tokens, action):
            theta = action[:, :4] + torch.tensor(iwm.NEUTRAL)
            return encoder(iwm.normalize(255 * iwm.jitter(image.expand(len(action), -1, -1, -1), theta)))

    found = iwm.rank_transformations(Perfect(), encoder, image, config, torch.Generator().manual_seed(0))
    assert iwm.ranks(found["right"], found["true"]).eq(1).all()
    assert (1 / iwm.ranks(found["rolled"], found["true"])).mean() < 0.5
    assert found["none"].shape == (8, 32) and found["theta"].shape == (32, 4)


def test_all_evaluations_run(monkeypatch):
    monkeypatch.setattr(iwm, "scene_tasks", functools.partial(iwm.scene_tasks, counts=(100, 50)))
    flags = "--steps 2 --probe-epochs 1 --tune-epochs 0.1 --eval-limit 200 --mrr-images 3 --mrr-bank 16".split()
    flags += "--mrr-actions 4 --tune-batch 64 --no-baselines --out run".split()
    iwm.main([*SMALL, *flags, "--eval", "knn,linear,attentive,mrr,finetune,segment,multitask,features"])
    rows = log_rows("run")
    results = rows[-1]["eval"]
    expected = {"knn20", "linear", "attentive", "mrr", "mrr rolled", "mrr none", "mrr chance", "tuned encoder",
                "random predictor", "tuned predictor", "tuned both", "segment, linear", "segment, random",
                "segment, predictor", "class, together", "count, alone", "segment, together"}  # fmt: skip
    assert expected <= results["trained"].keys()
    assert all(0 <= value <= 100 for key, value in results["trained"].items() if not key.endswith("_head"))
    report = next(row for row in rows if "action_ratio" in row)
    assert report["action_ratio"] > 0 and Path("run/picture.png").stat().st_size > 1000
    assert results["trained"]["mrr chance"] == pytest.approx(100 * sum(1 / k for k in range(1, 17)) / 16)


@pytest.mark.parametrize("conditioning", ["none", "sequence"])
def test_other_conditionings_train(conditioning):
    iwm.main([*SMALL, "--steps", "2", "--eval", "none", "--conditioning", conditioning, "--out", conditioning])
    ratio = next(row["action_ratio"] for row in log_rows(conditioning) if "action_ratio" in row)
    assert (ratio == 1) == (conditioning == "none")


def test_tuning_leaves_the_encoder_frozen_and_learns():
    """An easy task, to be learned in seconds by head, predictor, or all; segmentation by patch."""
    config = Config(image_size=16, patch=8, width=16, depth=1, heads=2, predictor_width=16, predictor_depth=1,
                    init_std=0.2, patch_std=0.2, tune_epochs=12, tune_batch=32, tune_lr=1e-2)  # fmt: skip
    log = common.OldLog("out", ALONE)
    model, target = iwm.build(config)
    labels = torch.arange(128) % 2
    pixels = (labels[:, None, None, None] * 100 + torch.randint(0, 100, (128, 3, 16, 16))).byte()
    split = iwm.in_memory(pixels, labels, [""] * 128, ["dark", "light"])
    task = iwm.Task("light", split, split, 2)
    before = [p.clone() for p in target.parameters()]
    for predictor, train_encoder in ((None, False), (model.predictor, False), (model.predictor, True)):
        (found,) = iwm.tune(target, predictor, [task], config, ALONE, log, train_encoder, fresh=True)
        assert found > 90
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters()))
    patches = torch.randint(0, 2, (128, 4), generator=torch.Generator().manual_seed(0))
    pixels = (patches.view(128, 1, 2, 2) * 150).repeat(1, 3, 1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    split = iwm.in_memory(pixels.byte(), patches, [""] * 128, [])
    tasks = [task, iwm.Task("where", split, split, 2)]
    both = iwm.tune(target, model.predictor, tasks, replace(config, tune_epochs=40), ALONE, log, fresh=True)
    assert min(both) > 75, "one predictor, two tasks"
