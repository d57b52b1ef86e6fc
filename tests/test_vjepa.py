"""vjepa.py against the reference implementation's numbers (tests/golden/vjepa) and its own promises."""

import json
import math
import random
import struct
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_runs import SCRIPTS, here, learn, log_rows, refused, run_several

import common
import vjepa
from vjepa import Config

GOLDEN = Path(__file__).parent / "golden" / "vjepa"
PAPER = {"tubelet": 2, "masks": "multiblock", "mask_blocks": (8, 2), "mask_scales": (0.15, 0.7)}
TINY = {**PAPER, "image_size": 20, "patch": 4, "frames": 8, "width": 16, "depth": 2, "heads": 2}
TINY.update(predictor_width=12, predictor_depth=1)
ROPE = {**PAPER, "image_size": 16, "patch": 4, "frames": 8, "heads": 1, "rope": True}
ROPE.update(width=16, depth=1, predictor_width=12, predictor_depth=1)
SCRIPT = SCRIPTS["vjepa"]
WORLD = common.World()


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=1e-5, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected, torch.float64), atol=atol, rtol=rtol)


def load(name="tiny_vjepa", **fields):
    """Return (model, target, config) of an official-layout tiny checkpoint."""
    path = GOLDEN / f"{name}.pth.tar"
    weights = vjepa.read_weights(path)
    config = Config(**fields)
    model, target = vjepa.load_networks(config, weights, WORLD)
    return model, target, config


def load_rope():
    return load("tiny_vjepa_rope", **ROPE)


# ----------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    for name in ("u24", "u20", "u384", "u1024"):
        width, side, times, _ = g[f"{name}_args"].tolist()
        close(vjepa.sincos_3d(width, (times, side, side))[0], g[name], atol=1e-6)


def test_rotary_positions():
    g = golden("rope")
    grid = (4, 3, 3)
    for width in (80, 64, 24, 16):
        ids = tensor(g["ids"], torch.long)
        np.testing.assert_array_equal(np.stack(np.unravel_index(g["ids"][0], grid)), g["dhw"])
        turned = vjepa.rotate(tensor(g[f"q_{width}"]), ids, grid)
        close(turned, g[f"rot_{width}"], atol=1e-6)


def official_name(part, name):
    """Return the authors' name of a parameter of ours."""
    if part == "encoder":
        name = name.replace("embed.", "patch_embed.proj.")
    elif not name.startswith("mask_tokens"):
        name = f"predictor_{name}"
    return f"{part}.backbone.{name}"


def test_forward_loss_gradients_and_ema():
    g = golden("forward")
    model, target, config = load(**TINY)
    img, patch, frames, tubelet, width, depth, _, predictor_width, *_ = g["dims"].tolist()
    assert (config.image_size, config.patch, config.frames) == (img, patch, frames)
    assert (config.tubelet, config.width, config.depth) == (tubelet, width, depth)
    assert config.predictor_width == predictor_width
    video = tensor(g["video"])
    masks = [tensor(g[f"mask_{k}_{i}"], torch.long) for i in (0, 1) for k in ("enc", "pred")]
    close(model.encoder(video), g["encoder_full"])
    tokens = target(video).detach()
    close(tokens[:, ::3], g["target_full_every3"])
    normed = F.layer_norm(tokens, tokens.shape[-1:])
    close(torch.stack([normed.mean(), normed.std()]), g["target_normed_mean_std"])
    for i in (0, 1):
        close(model.encoder(video, masks[2 * i]), g[f"context_{i}"])
        wanted = common.gather_tokens(normed, masks[2 * i + 1])
        close(wanted[:, :6], g[f"targets_{i}_head"])
    predictions = model(video, *masks)
    close(predictions[0], g["pred_0"])
    close(predictions[1][:, ::3], g["pred_1"])
    other = model.predict(video, *masks[:2], kind=1)
    close(other, g["pred_0_with_mask_token_1"])
    for i in (0, 1):
        loss = vjepa.vjepa_loss(predictions[i : i + 1], normed, masks[2 * i + 1 : 2 * i + 2])
        close(loss, g["loss_per_mask"][i], atol=1e-6)
    close(vjepa.targets_of(target, video, config), normed)
    loss = vjepa.vjepa_loss(predictions, normed, masks[1::2])
    close(loss, g["loss"], atol=1e-6)
    loss.backward()
    named = {}
    for part in ("encoder", "predictor"):
        parameters = dict(getattr(model, part).named_parameters())
        named.update({official_name(part, name): p for name, p in parameters.items()})
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        close(torch.nn.utils.get_total_norm(grads), g[f"grad_total_{part}"], rtol=1e-4)
    norms = torch.stack([named[name].grad.norm() for name in g["grad_names"]])
    close(norms, g["grad_norms"], rtol=1e-4, atol=1e-9)
    assert {name for name, p in named.items() if p.grad is not None} == set(g["grad_names"])
    common.EMA(target, model.encoder).update(0.998, torch.ones(()))
    close(target.blocks[0].attn.qkv.weight, g["ema_qkv0"], atol=1e-6)


def test_another_size_interpolates_positions():
    g = golden("forward")
    model, _, config = load(**TINY)
    video = F.interpolate(tensor(g["video_big_lowres"]), scale_factor=(1, 8, 8))
    table = vjepa.resample_positions(model.encoder.pos_embed, (4, 5, 5), (5, 6, 6))
    close(table[:, ::5], g["pos_embed_big"])
    close(model.encoder(video)[:, ::7], g["encoder_full_big"])
    # built for another clip, as in the released code: positions of that clip, afresh
    weights = vjepa.read_weights(GOLDEN / "tiny_vjepa.pth.tar")
    for changed in (replace(config, image_size=24), replace(config, frames=12)):
        network = vjepa.load_networks(changed, weights, WORLD)[1]
        fresh = vjepa.sincos_3d(config.width, vjepa.grid_of(changed))
        assert torch.equal(network.pos_embed, fresh)
    assert torch.equal(fresh[:, :100], model.encoder.pos_embed), "more frames are more rows"


def test_schedules():
    g = golden("schedules")
    for name in ("paper", "small"):
        ipe, epochs, warmup, scale, lr0, lr, lr1, decay, decay1, ema0, ema1 = g[f"{name}_args"]
        config = Config(warmup=warmup / epochs, lr=lr, lr_start=lr0, lr_final=lr1)
        config = replace(config, schedule_scale=scale, weight_decay=decay, momentum=ema0)
        config = replace(config, weight_decay_final=decay1)
        assert ema1 == 1
        steps = int(ipe * epochs)
        ours = np.array([vjepa.schedules(config, int(i), steps) for i in g[f"{name}_iter"]])
        for i, key in enumerate(("lr", "wd", "ema")):
            np.testing.assert_allclose(ours[:, i], g[f"{name}_{key}"], rtol=0, atol=1e-12)
    preset = Config(**vjepa.PRESETS["vit_l16"])
    rates = vjepa.schedules(preset, int(g["paper_iter"][0]), preset.steps)
    np.testing.assert_allclose(rates, [g[f"paper_{k}"][0] for k in ("lr", "wd", "ema")], atol=1e-12)


def test_attentive_probe():
    g, f = golden("probe"), golden("forward")
    probe = vjepa.load_probe(GOLDEN / "tiny_probe.pth.tar", Config(width=16, heads=2))
    tokens = tensor(g["tokens"])
    close(probe.pool(tokens), g["pooled"])
    logits = probe(tokens)
    close(logits, g["logits"])
    loss = F.cross_entropy(logits, tensor(g["labels"], torch.long))
    close(loss, g["loss"], atol=1e-6)
    loss.backward()
    named = dict(probe.named_parameters())
    for name, norm in zip(g["grad_names"], g["grad_norms"], strict=True):
        short = name.split("xattn.")[-1].split("block.")[-1].removeprefix("pooler.")
        ours = 0.0 if short.startswith("proj") else named[short].grad.norm().item()
        np.testing.assert_allclose(ours, norm, rtol=1e-4, atol=1e-7)
    _, target, _ = load(**TINY)
    two = target(tensor(f["video"])).flatten(0, 1)[None]  # two clips of one video
    assert two.shape == tuple(g["two_clip_n"])
    close(two[:, :3], g["two_clip_tokens_head"])
    close(two[:, -3:], g["two_clip_tokens_tail"])
    close(probe(two), g["two_clip_logits"])
    close(probe(two).softmax(1), g["two_clip_softmax"])


def test_clip_indices():
    g = golden("clips")
    for k, (length, frames, step, clips, overlap, duration, fps) in enumerate(g["cases"]):
        step = int(step if duration < 0 else duration * fps / frames)
        arguments = (int(length), int(frames), step, int(clips), bool(overlap))
        np.testing.assert_array_equal(vjepa.clip_indices(*arguments), g[f"case{k}_fixed"])
        np.random.seed(int(g["seed0"]) + k)
        ours = vjepa.clip_indices(*arguments, draws=SimpleNamespace(randrange=np.random.randint))
        np.testing.assert_array_equal(ours, g[f"case{k}_random"])


def test_crops_and_evaluation_transform():
    g = golden("transforms")
    draws = random.Random(7)
    sizes = [(240, 320)] * 12 + [(360, 202)] * 12
    ours = [vjepa.random_crop(h, w, (0.3, 1.0), draws) for h, w in sizes]
    np.testing.assert_array_equal(ours, g["crops_pre"])
    for name, aspect in (("full", (0.5, 2.0)), ("eval1", (1.0, 1.0))):
        ours = [vjepa.centre_crop(h, w, aspect) for h, w in sizes]
        np.testing.assert_array_equal(ours, g[f"crops_{name}"])
    video = torch.from_numpy(g["video_uint8"]).permute(0, 3, 1, 2)
    for name, aspect in (("1to1", (1.0, 1.0)), ("inflevel", (0.5, 2.0))):
        box = vjepa.centre_crop(*video.shape[-2:], aspect)
        clip = common.normalize(vjepa.crop_resize(video.float(), box, 16)).transpose(0, 1)
        close(clip[:, :1], g[f"voe_eval_{name}"], atol=1e-4)
        whole = vjepa.crop_resize(video, box, 16).float()
        assert (whole - vjepa.crop_resize(video.float(), box, 16)).abs().max() <= 1


# encoder and predictor parameters, position tables counted
SIZES = {
    "vit_l16": (305_490_944, 22_685_056),
    "vit_h16": (633_655_040, 22_881_920),
    "vit_h16_384": (637_546_240, 24_049_280),
    "vit_b16_rope": (114_584_832, None),
    "vit_l16_rope": (404_646_912, 29_179_264),
    "vit_h16_rope": (841_527_040, 29_376_128),
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_presets_have_the_papers_sizes(name):
    flags = ["--preset", name]
    config, _ = common.parse_config(Config, vjepa.PRESETS, vjepa.DATA_PRESETS, flags)
    with torch.device("meta"):
        model = vjepa.VJEPA(config)
    for part, count in zip((model.encoder, model.predictor), SIZES[name], strict=True):
        assert count in (None, sum(x.numel() for x in [*part.parameters(), *part.buffers()]))


# ------------------------------------------------------------------------------------------ masks

SETTINGS = {
    "vitl16_short": ((8, 14, 14), 8, 0.15),
    "vitl16_long": ((8, 14, 14), 2, 0.7),
    "tiny_short": ((4, 8, 8), 8, 0.15),
    "tiny_long": ((4, 8, 8), 2, 0.7),
}


def reference_visible(name, counter, batch):
    """Return bool [B, N] from torch's own generator, drawn clip by clip in the official order."""
    grid, blocks, scale = SETTINGS[name]
    size = vjepa.block_size(counter, grid[1], scale)
    rows = []
    for _ in range(batch):
        places = []
        for _ in range(blocks):
            room = [grid[1] - size[0] + 1, grid[2] - size[1] + 1, 1]
            top, left, _ = (torch.randint(0, n, (1,)).item() for n in room)
            places.append([(top + 0.5) / room[0], (left + 0.5) / room[1]])
        uniform = torch.tensor([places], dtype=torch.float64)
        visible = vjepa.outside_blocks(uniform, size, grid[1])
        rows.append(visible.flatten(1).repeat(1, grid[0]))
    return torch.cat(rows)


@pytest.mark.parametrize("name", SETTINGS)
def test_golden_masks_from_the_batched_code(name):
    """Given the reference's draws, the batched code makes the same blocks and the same lists."""
    g = golden("masks")
    grid, _, scale = SETTINGS[name]
    sizes = [(grid[0], *vjepa.block_size(k, grid[1], scale)) for k in range(24)]
    np.testing.assert_array_equal(sizes, g[f"{name}_block_sizes"])
    batch, seed = g["args"].tolist()
    torch.manual_seed(seed)
    for call in (0, 1):
        visible, hidden = vjepa.cut(reference_visible(name, call, batch))
        if f"{name}_enc_{call}" in g:
            np.testing.assert_array_equal(visible, g[f"{name}_enc_{call}"])
        if f"{name}_pred_{call}" in g:
            np.testing.assert_array_equal(hidden, g[f"{name}_pred_{call}"])
        elif f"{name}_pred_count_{call}" in g:
            assert hidden.shape[-1] == g[f"{name}_pred_count_{call}"]


@pytest.mark.parametrize("name", SETTINGS)
def test_batched_sampler_has_the_reference_statistics(name):
    g = golden("masks")
    grid, blocks, scale = SETTINGS[name]
    config = Config(image_size=grid[1] * 8, frames=grid[0] * 2, masks="multiblock", seed=1)
    config = replace(config, mask_blocks=(blocks,), mask_scales=(scale,), batch=24, micro=24)
    mean, std, low, high = g[f"{name}_stat_keep_mean_std_min_max"]
    lengths = []
    hits = torch.zeros(grid[1] * grid[2])
    for number in range(600):
        visible, _ = vjepa.sample_masks(replace(config, batch=4, micro=1), number)
        lengths.append(visible.shape[-1])
        hits += torch.bincount(visible[0] % len(hits), minlength=len(hits)) / grid[0]
    error = np.std(lengths) * math.sqrt(1 / len(lengths) + 1 / 4000)
    assert abs(np.mean(lengths) - mean) < 4 * error
    assert low <= min(lengths) and max(lengths) <= high + 4 * grid[0]
    hidden = 1 - np.mean(lengths) / math.prod(grid)
    assert hidden == pytest.approx(g[f"{name}_stat_mask_ratio_mean"], abs=0.02)
    quantiles = g[f"{name}_stat_keep_quantiles"]
    for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), quantiles, strict=True):
        below = np.mean(np.less(lengths, value)), np.mean(np.less_equal(lengths, value))
        assert below[0] - 0.08 < share < below[1] + 0.08
    probability = hits.view(grid[1:]) / len(lengths)
    assert np.abs(probability.numpy() - g[f"{name}_stat_keep_prob_hw"]).max() < 0.1
    cut = [[m.shape[1] for m in vjepa.sample_masks(config, step)] for step in range(150)]
    expected = g[f"{name}_stat_batch24_enc_mean_pred_mean"]
    np.testing.assert_allclose(np.mean(cut, axis=0), expected, rtol=0.12)
    assert std == pytest.approx(np.std(lengths), rel=0.15)


def test_exact_statistics_of_single_draws():
    """The reference's own 4000 draws of one setting, made again: every statistic to the last digit."""
    g, name = golden("masks"), "tiny_short"
    torch.manual_seed(int(g["args"][1]) + 1)
    visible = torch.cat([reference_visible(name, counter, 1) for counter in range(4000)])
    kept = visible.sum(1).double().numpy()
    ours = [kept.mean(), kept.std(), kept.min(), kept.max()]
    np.testing.assert_allclose(ours, g[f"{name}_stat_keep_mean_std_min_max"])
    places = visible.view(-1, 4, 8, 8).double().mean((0, 1))
    close(places, g[f"{name}_stat_keep_prob_hw"], atol=1e-6)


def test_other_kinds_of_masks():
    g = golden("masks")
    config = Config(image_size=112, batch=8, micro=8, masks="tube,random,time,causal")
    masks = vjepa.sample_masks(config, 0)
    tube, tube_hidden, some, hidden, first, rest, causal, _ = masks
    assert tube.shape[1] == g["tube_enc"].shape[1]
    assert tube_hidden.shape[1] == g["tube_pred_count"]
    places = tube.view(8, 8, -1)
    same = places - 196 * torch.arange(8)[None, :, None]
    assert (same == places[:, :1]).all(), "the same places at all times"
    assert some.shape[1] == 156 and hidden.shape[1] == 1568 - 156
    assert (torch.cat([first, rest], dim=1) == torch.arange(1568)).all()
    known = {vjepa.sample_masks(config, number)[4].shape[-1] / 196 for number in range(60)}
    assert known == set(range(1, 7))
    assert causal.max() < 6 * 196


@pytest.mark.parametrize("scale", [0.02, 0.9, 1.0])
def test_each_mask_leaves_something_visible_and_hides_something(scale):
    config = Config(
        image_size=64, mask_scales=(scale,), mask_blocks=(8,), masks="multiblock,causal"
    )
    for number in range(80):
        for chosen in vjepa.sample_masks(config, number):
            assert chosen.shape[1] > 0


def test_masks_depend_on_seed_and_number_only():
    config = Config(seed=3, masks="multiblock,random,time,tube,causal")
    first, again = vjepa.sample_masks(config, 7), vjepa.sample_masks(config, 7)
    assert len(first) == 10
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (vjepa.sample_masks(replace(config, seed=4), 7), vjepa.sample_masks(config, 8)):
        assert not torch.equal(other[2], first[2])


def test_context_only_is_encoded():
    """The encoder sees visible tokens only: the others' pixels change nothing."""
    model, _, _ = load(**TINY)
    video = torch.rand(1, 3, 8, 20, 20)
    keep = torch.arange(50)[None]  # the first two of four tubelets in time
    changed = video.clone()
    changed[:, :, 4:] += 1
    assert torch.equal(model.encoder(video, keep), model.encoder(changed, keep))
    assert not torch.equal(model.encoder(video), model.encoder(changed))


# ---------------------------------------------------------------------------------------- physics


def windows_of(video, frames=8):
    """[..., T, 4, 4] -> windows [W, 3, frames, 16, 16], enlarged."""
    large = tensor(video).repeat_interleave(4, -1).repeat_interleave(4, -2)
    return large.unfold(1, frames, 2).permute(1, 0, 4, 2, 3)


def test_surprise():
    g = golden("surprise")
    model, target, config = load_rope()
    contexts = g["context_lengths"].tolist()
    videos, row = g["quad_videos"], 0
    for quad, pairs in zip(videos, g["quad_matches"].tolist(), strict=True):
        found, parting = vjepa.match_quadruplet([tensor(v).transpose(0, 1) for v in quad])
        q = row // 4
        assert found == pairs and parting == g["quad_breaking_points"][q].tolist()
        for j in (j for pair in found for j in pair):
            assert g["quad_labels"][q][j] == g["quad_surprise_labels"][row]
            ours = vjepa.surprise(model, target, windows_of(quad[j]), contexts, config)
            close(ours, g["quad_surprise"][row])
            row += 1
    assert row == len(g["quad_surprise"])
    row = 0
    for p in range(3):
        for video in g[f"pair_videos_{p}"]:
            ours = vjepa.surprise(model, target, windows_of(video), contexts, config)
            close(F.pad(ours, (0, 5 - ours.shape[1])), g["pair_surprise"][row])
            row += 1
    window = windows_of(videos[0][0])[:1]
    close(target(window), g["win_target"])
    close(model.encoder(window), g["win_encoder_nomask"])
    keep = torch.arange(32)[None]
    close(model.encoder(window, keep), g["win_context"])
    close(model(window, keep, keep + 32)[0], g["win_pred"])
    chosen = tensor(g["rand_keep_idx"], torch.long)
    close(model.encoder(window, chosen), g["rand_keep_feat"])


def test_pixel_targets():
    g, s = golden("pixel_targets"), golden("surprise")
    config = Config(tubelet=2, patch=4)
    window = windows_of(s["quad_videos"][0][0])[:1]
    close(vjepa.pixel_targets(window, config)[0], g["window0_targets"])
    row = 0
    for quad, pairs in zip(s["quad_videos"], s["quad_matches"].tolist(), strict=True):
        for j in (j for pair in pairs for j in pair):  # the released branch predicts zeros
            targets = vjepa.pixel_targets(windows_of(quad[j]), config).abs()
            contexts = s["context_lengths"].tolist()
            ours = torch.stack([targets[:, c // 2 * 16 :].mean((1, 2)) for c in contexts])
            close(ours, g["surprise_zero_predictions"][row])
            row += 1


def test_physics_metrics():
    """Relative accuracy and AUROC, of mean and largest surprise, at each context and filtered."""
    g = golden("metrics")
    columns = list(g["names"])
    for name in ("a", "b", "c"):
        losses = tensor(g[f"{name}_losses"]).double()
        labels = g[f"{name}_labels"]
        both = torch.stack([vjepa.aggregate(row) for row in losses])  # [rows, 2, K + 1]
        good, bad = both[labels == 1], both[labels == 0]
        accuracy = 100 * (good < bad).double().mean(0)
        expected = g[f"{name}_metrics"]
        areas = [
            [vjepa.auroc(x, y) for x, y in zip(good[:, i].T, bad[:, i].T, strict=True)]
            for i in (0, 1)
        ]
        for i, word in enumerate(("avg", "max")):
            (column,) = [
                k for k, c in enumerate(columns) if "rel" in c.lower() and word in c.lower()
            ]
            close(accuracy[i], expected[:, column], atol=1e-3)
            (column,) = [
                k for k, c in enumerate(columns) if "auroc" in c.lower() and word in c.lower()
            ]
            close(areas[i], expected[:, column], atol=1e-3)
        for i, word in enumerate(("average", "maximum")):
            close(1 - both[:, i, -1], g[f"{name}_test_{word}_surprise"], atol=1e-5)
        contexts = range(losses.shape[1])
        pairs = list(zip(losses[labels == 1], losses[labels == 0], strict=True))
        found = vjepa.summarise(pairs, contexts)
        assert found["best"] == pytest.approx(accuracy[0].max().item())
        assert found["from"] <= found["best"] <= found["to"]
        assert found["AUROC"] == pytest.approx(100 * areas[1][-1])


def test_intervals_cover():
    """Of 95 % intervals of a share of pairs, about 95 % hold the truth; all right gives no width."""
    draws = np.random.default_rng(0).random((100, 60)) < 0.8
    hits = []
    for row in draws:
        signs = [2.0 * right - 1 for right in row]
        pairs = [(torch.zeros(1, 2).double(), torch.full((1, 2), s).double()) for s in signs]
        found = vjepa.summarise(pairs, [4])
        hits.append(found["from"] <= 80 <= found["to"])
    assert 0.85 < np.mean(hits) < 1
    pairs = [(torch.zeros(1, 2).double(), torch.ones(1, 2).double())] * 10
    found = vjepa.summarise(pairs, [4])
    assert found["from"] == found["to"] == found["best"] == found["AUROC"] == pytest.approx(100)


# -------------------------------------------------------------------------------------- toy world


def quads(name, count, first=0):
    """Return [count, 4, 38, 3, 32, 32]: possible, impossible, possible, impossible."""
    stories = [story for pair in vjepa.quadruplet() for story in pair]
    scenes = [vjepa.make_scene(name, vjepa.dice("test", name, first + i), 32) for i in range(count)]
    return np.stack([[scene(story) for story in stories] for scene in scenes])


@pytest.mark.parametrize("name", vjepa.PROPERTIES)
def test_possible_and_impossible_videos_are_made_of_the_same_frames(name):
    scene = vjepa.make_scene(name, vjepa.dice(5), 32)
    hidden, other, half, different = scene([(0, 1), (1, 1), (0, 2 / 3), (1, 2 / 3)])
    assert (hidden == other).all(), "a full screen hides the state"
    assert (half != different).any()
    for videos in quads(name, 4):
        possible, impossible, other, wrong = videos
        for a, b in ((possible, impossible), (other, wrong)):
            assert sorted(f.tobytes() for f in a) == sorted(f.tobytes() for f in b)
            assert (a[:10] == b[:10]).all(), "a pair begins alike"
            assert (a != b).any()
        for stride in (1, 2):  # of the windows' starts
            for n in (1, 2, 5):
                starts = range(0, 38 - n + 1, stride)
                grams = [Counter(v[t : t + n].tobytes() for t in starts) for v in videos]
                assert grams[0] + grams[2] == grams[1] + grams[3], (n, stride)
    assert grams[0] != grams[1]


def test_toy_clips_are_legal_and_reproducible():
    split, _, _ = vjepa.open_data(Config(), "")
    config = Config(batch=10, micro=10)
    _, first, *_ = vjepa.make_micro_batch(split, config, 3)
    _, again, *_ = vjepa.make_micro_batch(split, config, 3)
    _, other, *_ = vjepa.make_micro_batch(split, config, 4)
    assert first.shape == (10, 1, 16, 3, 32, 32) and torch.equal(first, again)
    assert not torch.equal(first, other)
    for number in range(300):
        story = vjepa.walk(vjepa.dice(number), 16)
        assert len(story) == 16
        known = None
        for phase, screen in story:
            if 0 < phase < 1:
                known = None
            elif screen < 1:
                assert known in (None, phase), "the state changed out of sight"
                known = phase


def test_surprise_at_the_impossible_is_what_is_counted(monkeypatch, capsys):
    """A network that is surprised by what is impossible is right; one without memory is at chance."""
    config = Config(width=16, depth=2, heads=2, predictor_width=16, precision="fp32")
    monkeypatch.setattr(vjepa, "QUADRUPLETS", 2)
    run = common.Run(config, WORLD)
    shown = vjepa.evaluate_physics(None, config, WORLD, run)
    assert list(shown) == list(vjepa.PROPERTIES)
    found = log_rows(run.out)[-1]["physics"]["random"]
    for row in found.values():
        assert abs(row["filtered"] - 50) <= 25
    wrong = {pair[1].numpy().tobytes() for _, pair in vjepa.toy_pairs(config)}

    def oracle(model, target, video, contexts, config, world):
        return torch.full((4, 12), 1.0 if video.numpy().tobytes() in wrong else 0.5).double()

    monkeypatch.setattr(vjepa, "video_surprise", oracle)
    vjepa.evaluate_physics(None, config, WORLD, run)
    for row in log_rows(run.out)[-1]["physics"]["random"].values():
        assert row["best"] == row["AUROC"] == 100
    assert "mean" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- videos


def numbered(number, size=(32, 48)):
    """Return a frame uint8 [H, W, 3] that no other number has."""
    coarse = np.random.default_rng(number).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.NEAREST))


def write_video(path, count, codec="mpeg4", gop=12, b_frames=2, stamps=None, frame=numbered):
    """Write a video of numbered frames; stamps: their times in 1/1000 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frame(0).shape[:2]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.gop_size = gop
        if codec in ("mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
            stream.codec_context.bit_rate = 2_000_000
        if stamps is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i in range(count):
            picture = av.VideoFrame.from_ndarray(frame(i), format="rgb24")
            if stamps is not None:
                picture.pts, picture.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def decoded(path):
    """Return what a decoder gives from the start on, uint8 [T, 3, H, W]."""
    with av.open(str(path)) as video:
        frames = [vjepa.upright(frame) for frame in video.decode(video.streams.best("video"))]
    return np.stack(frames).transpose(0, 3, 1, 2)


STAMPS = np.cumsum(np.random.default_rng(0).integers(20, 200, 60)).tolist()
CONTAINERS = {
    "a.mp4": {},
    "b.avi": {},
    "c.mkv": {},
    "d.ts": {"codec": "mpeg2video"},
    "e.avi": {"b_frames": 0},
    "f.mkv": {"stamps": STAMPS},
    "g.mp4": {"stamps": STAMPS},
    "h.ts": {"codec": "mpeg2video", "gop": 100, "b_frames": 0},
    "i.mpg": {"codec": "mpeg2video"},
    "j.webm": {"codec": "libvpx"},
    "k.ts": {"codec": "libx264"},
    "l.h264": {"codec": "libx264"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_are_the_ones_asked_for(name, tmp_path):
    """Seeking, B-frames, any container: always the frames that decoding from the start gives."""
    try:
        path = write_video(tmp_path / name, 60, **CONTAINERS[name])
    except (ValueError, av.error.FFmpegError):
        pytest.skip("this PyAV cannot write it")
    expected = decoded(path)
    assert len(expected) == 60
    r = np.random.default_rng(0)
    for indices in (
        np.arange(60),
        np.array([[57, 58, 59]]),
        np.array([0]),
        np.arange(30, 38),
        r.integers(0, 60, (3, 5)),
        np.array([[50, 51, 52], [3, 3, 40]]),
    ):
        rate, listed = vjepa.list_frames(path)
        assert len(listed) == 60 and (rate == 25 or "stamps" in CONTAINERS[name])
        np.testing.assert_array_equal(vjepa.read_frames(path, indices), expected[indices])


def trim(source, path, skip):
    """Copy a video without decoding, by an edit list that leaves out its first `skip` frames."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                shift = skip * round(1 / (25 * packet.time_base))
                packet.pts -= shift
                packet.dts -= shift
                packet.stream = copy
                new.mux(packet)
    assert b"elst" in path.read_bytes()
    return path


@pytest.mark.parametrize("skip", [5, 12, 31])
def test_frames_before_an_edit_list_do_not_exist(skip, tmp_path):
    source = write_video(tmp_path / "a.mp4", 60)
    path = trim(source, tmp_path / "b.mp4", skip)
    expected = decoded(path)
    np.testing.assert_array_equal(expected, decoded(source)[skip:])
    assert len(vjepa.list_frames(path)[1]) == 60 - skip
    for indices in (np.arange(60 - skip), np.array([0]), np.array([[20, 21], [27, 1]])):
        np.testing.assert_array_equal(vjepa.read_frames(path, indices), expected[indices])


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 100)
    seen = []
    upright = vjepa.upright
    monkeypatch.setattr(vjepa, "upright", lambda frame: seen.append(frame.pts) or upright(frame))
    opened = []
    open_file = av.open
    monkeypatch.setattr(av, "open", lambda *args: opened.append(args) or open_file(*args))
    vjepa.read_frames(path, np.array([97, 99]))
    assert len(seen) == 2 and len(opened) == 2, "listed, then found by one seek"


DISPLAYS = {  # display matrix (a, b, c, d), and what it does to the picture [3, H, W]
    "upright": ((1, 0, 0, 1), lambda x: x),
    "turned by 90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1, (1, 2))),
    "turned by 180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2, (1, 2))),
    "turned by 270": ((0, -1, 1, 0), lambda x: np.rot90(x, 1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, :, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(1, 2)),
}


@pytest.mark.parametrize("name", DISPLAYS)
def test_turned_and_mirrored_videos(name, tmp_path):
    (a, b, c, d), change = DISPLAYS[name]
    path = write_video(tmp_path / "a.mp4", 3)
    expected = vjepa.read_frames(path, np.arange(3)).numpy()
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    numbers = [x << 16 for x in (a, b)] + [0] + [x << 16 for x in (c, d)] + [0, 0, 0, 1 << 30]
    data[at : at + 36] = struct.pack(">9i", *numbers)
    path.write_bytes(data)
    frames = vjepa.read_frames(path, np.arange(3)).numpy()
    for ours, upright in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(ours, change(upright))


def test_short_videos_rates_and_pictures(tmp_path):
    split = vjepa.Videos([write_video(tmp_path / "short.mp4", 3)], ["x"], torch.tensor([-1]), [])
    split = replace(split, config=Config(step=4), clips=2)
    clips = split.read_clips(0, None)
    assert clips.shape == (2, 16, 3, 32, 48)
    asked = []
    split = replace(split, config=Config(seconds=3.2, frames=8), clips=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vjepa, "clip_indices", lambda *args: asked.append(args) or np.zeros((1, 8), int)
        )
        split.read_clips(0, None)
    assert asked[0][:3] == (3, 8, 10)  # 3.2 s of 25 frames a second, 8 frames
    for i in (9, 10, 11):
        (tmp_path / "clip").mkdir(exist_ok=True)
        Image.fromarray(numbered(i)).save(tmp_path / "clip" / f"{i}.png")
    (tmp_path / "clip" / "._9.png").write_bytes(b"\0\5\x16\7")
    frames = vjepa.read_frames(tmp_path / "clip", np.arange(3))
    np.testing.assert_array_equal(frames[:, :, 0, 0], [numbered(i)[0, 0] for i in (9, 10, 11)])
    picture = vjepa.read_frames(tmp_path / "clip" / "9.png", np.zeros(4, int))
    assert picture.shape == (4, 3, 32, 48)


def write_sound(path):
    """Write a file with sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_videos_are_skipped_counted_and_limited(workers, tmp_path, capsys):
    data = tmp_path / "videos"
    good = write_video(data / "good.mp4", 20).read_bytes()
    broken = {"cut.mp4": good[: len(good) // 2], "empty.mp4": b"", "text.mp4": b"hello" * 100}
    broken.update({"photo.mkv": b"\xff\xd8\xff" + bytes(500), "noise.avi": bytes(range(256)) * 20})
    for name, content in broken.items():
        (data / name).write_bytes(content)
    write_sound(data / "sound.mp4")
    (data / "._good.mp4").write_bytes(b"\0\5\x16\7")
    (data / "wrong-name.avi").write_bytes(good)  # what a file holds counts, not its name
    for name in (*broken, "sound.mp4"):
        with pytest.raises((OSError, LookupError, ValueError)):
            vjepa.every(data / name, slice(None))
    assert len(vjepa.every(data / "wrong-name.avi", slice(None))) == 20
    flags = [SCRIPT.folder.replace("--workers 0", f"--workers {workers}"), "--steps 3"]
    assert "more than 1 %" in refused(capsys, SCRIPT, *flags, f"--data {data} --out stopped")
    for name in ("good.mp4", "wrong-name.avi"):
        (data / name).unlink()
    assert "more than 1 %" in refused(capsys, SCRIPT, *flags, f"--data {data} --out none")


def test_folders_of_pictures_are_videos(tmp_path):
    for name in ("train/up/1", "train/up/2", "train/down/1", "val/up/3"):
        for i in range(3):
            path = tmp_path / "clips" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbered(i)).save(path)
    Image.fromarray(numbered(7)).save(tmp_path / "clips" / "train" / "down" / "still.jpg")
    write_video(tmp_path / "clips" / "train" / "up" / "2.mp4", 3)
    train, val, unseen = vjepa.open_data(Config(data=str(tmp_path / "clips")), "knn")
    names = [path.relative_to(tmp_path / "clips").as_posix() for path in train.images]
    expected = [
        "train/down/1",
        "train/down/still.jpg",
        "train/up/1",
        "train/up/2",
        "train/up/2.mp4",
    ]
    assert names == expected and train.labels.tolist() == [0, 0, 1, 1, 1]
    assert len(val) == 1 and val.labels.tolist() == [1] and unseen.images == val.images
    flat, *_ = vjepa.open_data(Config(data=str(tmp_path / "clips" / "train" / "up")), "")
    assert len(flat) == 3 and not flat.classes
    for i in range(4):
        (tmp_path / "stills" / "train").mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered(i)).save(tmp_path / "stills" / "train" / f"{i}.png")
    assert len(vjepa.open_data(Config(data=str(tmp_path / "stills")), "")[0]) == 4


LISTS = {
    "space": "{a} 0\n{b} 1\n",
    "comma": "{a},0\n{b},1\n",
    "tab": "{a}\t0\n{b}\t1\n",
    "quotes": '"{a}",0\n"{b}", 1\n',
    "header": "path,label\n{a},0\n{b},1\n",
    "mark": "\ufeff{a} 0\r\n{b} 1\r\n",
    "floats": "{a} 0.0\n\n{b} 1.0\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(kind, tmp_path):
    a = write_video(tmp_path / "my video, 1.mp4", 3)
    (tmp_path / "frames 2").mkdir()
    Image.fromarray(numbered(0)).save(tmp_path / "frames 2" / "0.png")
    text = LISTS[kind].format(a=a.name, b="frames 2")
    (tmp_path / "list.csv").write_text(text, encoding="utf-8", newline="")
    split, *_ = vjepa.open_data(Config(data=str(tmp_path / "list.csv")), "")
    assert split.images == [a, tmp_path / "frames 2"]
    assert split.labels.tolist() == [0, 1] and split.classes == ["0", "1"]


def test_lists_that_are_wrong(tmp_path, capsys):
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", 3)
    texts = {
        "0.mp4 0\n1.mp4\n2.mp4 1\n": "line 2",
        "0.mp4 dog\n": "line 1",
        "0.mp4\n": "line 1",
        "clip\n0.mp4 0\n": "line 1",
        "": "no videos",
    }
    for text, words in texts.items():
        (tmp_path / "bad.csv").write_text(text)
        line = refused(capsys, SCRIPT, SCRIPT.folder, f"--data {tmp_path / 'bad.csv'} --steps 1")
        assert words in line and "path label" in line
    (tmp_path / "a.csv").write_text("0.mp4 0\n1.mp4 1\n")
    (tmp_path / "b.csv").write_text("1.mp4 2\n")
    flags = [SCRIPT.folder, "--steps 1 --eval knn --out lists"]
    here(
        SCRIPT,
        *flags,
        f"--data {tmp_path / 'a.csv'},{tmp_path / 'b.csv'} --val {tmp_path / 'a.csv'}",
    )
    assert "has no labels" in capsys.readouterr().out, "labels of several lists are not merged"
    flags = f"--data {tmp_path / 'a.csv'} --val {tmp_path / 'b.csv'} --steps 1 --eval knn"
    assert "lacks" in refused(capsys, SCRIPT, SCRIPT.folder, flags)


def test_random_clips_have_crops_of_their_own(tmp_path):
    path = write_video(tmp_path / "a.mp4", 40)
    split = vjepa.Videos([path], ["a"], torch.tensor([0]), ["x"], config=Config(), clips=2)
    still = split.read_clips(0, None)
    assert still.shape[0] == 2
    with pytest.MonkeyPatch.context() as patch:
        boxes = []
        crop = vjepa.random_crop
        patch.setattr(vjepa, "random_crop", lambda *args: boxes.append(crop(*args)) or boxes[-1])
        config = Config(batch=1, micro=1, crop_scale=(0.08, 0.5))
        _, clips, *_ = vjepa.make_micro_batch(replace(split, config=config), config, 1)
    assert clips.shape == (1, 2, 16, 3, 32, 32)
    assert len(boxes) == 2 and boxes[0] != boxes[1]


def test_evaluation_sees_the_centre_or_three_squares(tmp_path):
    path = write_video(tmp_path / "a.mp4", 16)
    whole = torch.from_numpy(decoded(path))[[0]]
    split = vjepa.Videos([path], ["a"], torch.tensor([0]), ["x"], config=Config())
    for view in range(3):
        _, clips, _ = common.centre_crops(replace(split, view=view), 32, [0])
        square = whole[0, :, :, 8 * view : 8 * view + 32]
        assert torch.equal(clips[0, 0, 0], square)
    _, clips, _ = common.centre_crops(split, 32, [0])
    side = 32 * 32 / 36
    box = ((32 - side) / 2, (48 - side) / 2, side, side)
    assert torch.equal(clips[0, 0, :1], vjepa.crop_resize(whole, box, 32))


# ------------------------------------------------------------------------------- weights and runs


def test_official_checkpoint_in_features_and_probe_out(tmp_path):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for i in range(5):

            def frame(number, i=i):
                return numbered(10 * i + number, (20, 20))

            path = data / split / "abcde"[i] / f"{i}.mkv"
            write_video(path, 8, codec="ffv1", frame=frame)
    tiny = GOLDEN / "tiny_vjepa.pth.tar"
    shape = "--image-size 20 --patch 4 --frames 8 --width 16 --depth 2 --heads 2 --masks multiblock"
    shape += " --predictor-width 12 --predictor-depth 1 --mask-blocks 8 2 --mask-scales 0.15 0.7"
    flags = f"--init {tiny} {shape} --no-train --data {data} --preset toy --device cpu"
    flags += f" --probe-init {GOLDEN / 'tiny_probe.pth.tar'} --eval features,probe --out"
    here(SCRIPT, flags, "one")
    run_several(f"vjepa {flags} two", ranks=2)
    encoder = vjepa.load_encoder(tiny, **TINY)
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        assert list(found["labels"]) == list(range(5)) and found["paths"][0] == "val/a/0.mkv"
        (indices,) = vjepa.clip_indices(8, 8, 1, overlap=True)
        video = torch.from_numpy(decoded(data / "val" / "a" / "0.mkv")[indices])
        tokens = encoder(common.normalize(video).transpose(0, 1)[None])
        np.testing.assert_allclose(found["features"][0], tokens.mean(1)[0], atol=1e-5)
    one, two = (log_rows(out)[-1]["eval"]["trained"]["probe"] for out in ("one", "two"))
    assert one == two


def test_probe_and_knn_on_labelled_videos(tmp_path, capsys):
    for split in ("train", "val"):
        for i in range(6):
            write_video(tmp_path / "data" / split / ("up", "down")[i % 2] / f"{i}.mp4", 12 + i)
    flags = [SCRIPT.folder, f"--data {tmp_path / 'data'} --steps 1 --eval knn,probe"]
    flags += ["--probe-clips 2 --probe-views 3 --probe-epochs 2 --workers 1"]
    here(SCRIPT, *flags, "--out folder")
    results = log_rows("folder")[-1]["eval"]
    assert set(results["trained"]) == set(results["random"]) == {"knn", "probe"}
    assert set(results["pixels"]) == {"knn"}
    assert Image.open("folder/picture.png").width > 500


def test_probe_settings(monkeypatch, tmp_path):
    """Image sets: batch 1,024 and weight decay 0.001; videos: 256 and 0.01; under autocast."""
    seen = []
    monkeypatch.setattr(common, "set_rates", lambda _, lr, decay: seen.append(decay))
    config = Config(width=16, depth=1, heads=2, predictor_width=16, frames=4, probe_epochs=1)
    world = common.World(dtype=torch.bfloat16)
    _, encoder = vjepa.load_networks(config, None, world)
    types = []
    encoder.blocks[0].mlp.fc1.register_forward_hook(lambda *args: types.append(args[-1].dtype))
    Image.fromarray(numbered(0)).save(tmp_path / "a.png")
    for path, decay in ((tmp_path / "a.png", 0.001), (write_video(tmp_path / "a.mp4", 5), 0.01)):
        split = vjepa.Videos([path], ["a"], torch.tensor([0]), ["x"], config=config)
        vjepa.train_probe(encoder, split, config, world)
        assert seen[-1] == decay
    assert set(types) == {torch.bfloat16}


def moved(count, start, jump=None):
    """Return a video uint8 [T, H, W, 3] of a square that moves right, and jumps back at `jump`."""
    video = np.full((count, 20, 24, 3), 30, np.uint8)
    for t in range(count):
        x = (start + t + (7 if jump is not None and t >= jump else 0)) % 18
        video[t, 6:12, x : x + 6] = 220
    return video


def physics_run(name, root, code=None, out=""):
    flags = f"--steps 1 --image-size 24 --eval physics --physics {name} --physics-data {root}"
    here(SCRIPT, SCRIPT.small.replace("--eval none", ""), flags, f"--out {out or name}", code=code)
    return log_rows(name)[-1]["physics"]["trained"] if code is None else None


def test_intphys(tmp_path, capsys):
    for block in ("O1", "O3"):
        for scene in ("01", "02"):
            starts = {1: (0, None), 2: (3, 15), 3: (3, None), 4: (0, 15)}
            for part, (start, jump) in starts.items():
                folder = tmp_path / "dev" / block / scene / str(part)
                (folder / "scene").mkdir(parents=True)
                for t, frame in enumerate(moved(40, start, jump)):
                    Image.fromarray(frame).save(folder / "scene" / f"scene_{t + 1:03d}.png")
                (folder / "scene" / "._scene_001.png").write_bytes(b"\0")
                status = {"header": {"is_possible": jump is None}}
                (folder / "status.json").write_text(json.dumps(status))
    pairs = list(vjepa.intphys_pairs(Config(physics_data=str(tmp_path))))
    assert [name for name, _ in pairs] == ["O1"] * 4 + ["O3"] * 4
    for _, (possible, impossible) in pairs:
        assert len(possible) == len(impossible) == 20
        assert (possible[:7] == impossible[:7]).all() and (possible[9] != impossible[9]).any()
    assert physics_run("intphys", tmp_path).keys() == {"O1", "O3"}
    printed = capsys.readouterr().out
    assert "Permanence" in printed and "Continuity" in printed
    status = tmp_path / "dev" / "O1" / "02" / "4" / "status.json"
    status.write_text(json.dumps({"header": {"is_possible": True}}))
    with pytest.raises(SystemExit) as stop:
        list(vjepa.intphys_pairs(Config(physics_data=str(tmp_path))))
    assert stop.value.code == 2 and "O1/02" in capsys.readouterr().err


def test_grasp(tmp_path, capsys):
    for prefix, jump in (("P", None), ("IP", 100)):
        for name in ("Collision", "SolidityContinuity2"):
            for i in range(2):
                video = moved(180, i, jump)
                path = tmp_path / "level2" / f"{prefix}_{name}" / f"{i}.mp4"
                write_video(path, len(video), frame=lambda t, video=video: video[t])
                (path.parent / "._0.mp4").write_bytes(b"\0")
    found = physics_run("grasp", tmp_path)
    assert found.keys() == {"Collision", "SolidityContinuity2"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Solidity ", "Continuity ", "Collision "))
    (tmp_path / "level2" / "IP_Collision" / "1.mp4").unlink()
    physics_run("grasp", tmp_path, code=2, out="gap")
    assert "cannot be read" in capsys.readouterr().err


def test_inflevel(tmp_path, capsys):
    for name in ("continuity", "solidity", "gravity"):
        for kind, jump, extra in (("vv", None, 0), ("vi", 120, 3)):
            video = np.concatenate([moved(extra + 10, 0), moved(180, 2, jump)])
            path = tmp_path / name / f"left__{name}__{kind}.mp4"
            write_video(path, len(video), frame=lambda t, video=video: video[t])
        columns = ("path", "end_priming_2", "label")
        header = ", ".join(f"vid{i}_{column}" for i in (1, 2) for column in columns)
        row = f"{name}/left__{name}__vv.mp4, 9, p, {name}/left__{name}__vi.mp4, 12, i"
        (tmp_path / name / "pairs.csv").write_text(f"{header}\n{row}\n")
        (tmp_path / name / "pairs.csv").rename(tmp_path / f"{name}_pairs.csv")
    pairs = list(vjepa.inflevel_pairs(Config(physics_data=str(tmp_path))))
    assert [name for name, _ in pairs] == ["continuity", "gravity", "solidity"]
    for _, (possible, impossible) in pairs:
        assert len(possible) == len(impossible) == 36
        differences = (possible.float() - impossible.float()).abs().mean((1, 2, 3))
        assert differences[:24].max() < 0.5 * differences[25:].min(), "they part after 120 frames"
    assert physics_run("inflevel", tmp_path).keys() == {"continuity", "solidity", "gravity"}
    assert "Permanence" in capsys.readouterr().out


def test_pixel_control_and_rotary_network(monkeypatch):
    monkeypatch.setattr(vjepa, "QUADRUPLETS", 1)
    small = SCRIPT.small.replace("--eval none", "--eval physics")
    here(SCRIPT, small, "--steps 2 --out pixels --target pixels")
    state = torch.load("pixels/last.pt", weights_only=True)
    for name, weight in state["target"].items():
        torch.testing.assert_close(weight, state["model"][f"encoder.{name}"])
    here(
        SCRIPT,
        small,
        "--steps 2 --rope --heads 1 --masks multiblock,causal,random,tube,time --out r",
    )
    for out in ("pixels", "r"):
        physics = log_rows(out)[-1]["physics"]
        assert physics.keys() == {"trained", "random"}
        assert all(found.keys() == set(vjepa.PROPERTIES) for found in physics.values())
        assert np.asarray(Image.open(f"{out}/picture.png")).std() > 20


def test_gradients_are_clipped_apart_and_after_the_warmup(monkeypatch):
    clip, seen = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, limit):
        parameters = list(parameters)
        clip(parameters, limit)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        seen.append((len(parameters), norm.item()))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    monkeypatch.setattr(vjepa, "CLIP", 1e-5)
    here(SCRIPT, SCRIPT.small, "--steps 4 --warmup 0.5 --out clipped")
    assert len(seen) == 4 and seen[0][0] != seen[1][0], (
        "encoder and predictor, in the last two steps"
    )
    assert all(norm == pytest.approx(1e-5, rel=0.02) for _, norm in seen), seen


def test_vjepa_learns():
    """In half a minute on toy videos: what is in view is expected to stay, and the target does not collapse.

    (That hidden things stay, which makes the physics, takes 1,000 steps.)
    """
    rows = learn(SCRIPT, "--steps 300 --eval none --workers 0")
    assert rows[-1]["feature_std"] > 0.1 and rows[-1]["feature_rank"] > 3, "collapsed"
    weights = vjepa.read_weights("learnt/last.pt")
    config = Config(**weights["fields"])
    networks = vjepa.load_networks(config, weights, WORLD)
    right = []
    for name in ("continuity", "colour", "solidity"):
        for number in range(20):
            scene = vjepa.make_scene(name, vjepa.dice("learns", name, number), 32)
            state = number % 2
            stays = scene([(state, 0)] * 16)
            swaps = scene([(state, 0)] * 8 + [(1 - state, 0)] * 8)
            possible, impossible = (
                vjepa.video_surprise(*networks, video, [8], config, WORLD)
                for video in (stays, swaps)
            )
            right.append(bool(possible < impossible))
    assert np.mean(right) > 0.65, f"{np.mean(right)} of 60 pairs right: chance 0.5, error 0.06"
