"""vjepa.py against the reference implementation's numbers (tests/golden/vjepa) and its own promises."""

import json
import math
import random
import struct
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

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
    model, target = vjepa.load_networks(config, weights, path, WORLD)
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
        cosine, sine, partner = vjepa.rotary_table(width, grid, torch.device("cpu"))
        ids = tensor(g["ids"], torch.long)
        np.testing.assert_array_equal(np.stack(np.unravel_index(g["ids"][0], grid)), g["dhw"])
        q = tensor(g[f"q_{width}"])
        turned = vjepa.rotate(q, cosine[ids][:, None], sine[ids][:, None], partner)
        close(turned, g[f"rot_{width}"], atol=1e-6)


def official_name(part, name):
    """Return the authors' name of a parameter of ours."""
    name = name.replace("patch_embed.", "patch_embed.proj.")
    if part == "predictor" and name.split(".")[0] in ("blocks", "norm"):
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
    tubelets = vjepa.to_tubelets(video, tubelet, patch)
    for i in (0, 1):
        close(model.encoder(tubelets, masks[2 * i]), g[f"context_{i}"])
        wanted = common.gather_tokens(normed, masks[2 * i + 1])
        close(wanted[:, :6], g[f"targets_{i}_head"])
    predictions = model(tubelets, *masks)
    close(predictions[0], g["pred_0"])
    close(predictions[1][:, ::3], g["pred_1"])
    other = model.predictor(model.encoder(tubelets, masks[0]), *masks[:2], kind=1)
    close(other, g["pred_0_with_mask_token_1"])
    for i in (0, 1):
        loss = vjepa.vjepa_loss(predictions[i : i + 1], tokens, masks[2 * i + 1 : 2 * i + 2])
        close(loss, g["loss_per_mask"][i], atol=1e-6)
    loss = vjepa.vjepa_loss(predictions, tokens, masks[1::2])
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
    path = GOLDEN / "tiny_vjepa.pth.tar"
    weights = vjepa.read_weights(path)
    larger = replace(config, image_size=24)
    close(
        vjepa.load_networks(larger, weights, path, WORLD)[1](video[:, :, :8]),
        vjepa.load_encoder(path, **TINY)(video[:, :, :8]).numpy(),
    )
    longer = vjepa.load_networks(replace(config, frames=12), weights, path, WORLD)[1]
    close(longer.pos_embed[:, :100], model.encoder.pos_embed.detach().numpy())


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
        ours = vjepa.clip_indices(*arguments, draw=np.random.randint)
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
        assert count in (None, sum(p.numel() for p in part.parameters()))


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
    size = vjepa.block_size(counter, grid, scale)
    rows = []
    for _ in range(batch):
        places = []
        for _ in range(blocks):
            room = [grid[1] - size[0] + 1, grid[2] - size[1] + 1, 1]
            top, left, _ = (torch.randint(0, n, (1,)).item() for n in room)
            places.append([(top + 0.5) / room[0], (left + 0.5) / room[1]])
        uniform = torch.tensor([places], dtype=torch.float64)
        rows.append(vjepa.outside_blocks(uniform, size, grid))
    return torch.cat(rows)


@pytest.mark.parametrize("name", SETTINGS)
def test_golden_masks_from_the_batched_code(name):
    """Given the reference's draws, the batched code makes the same blocks and the same lists."""
    g = golden("masks")
    grid, _, scale = SETTINGS[name]
    sizes = [(grid[0], *vjepa.block_size(k, grid, scale)) for k in range(24)]
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
    config = Config(image_size=64, mask_scales=(scale,), mask_blocks=(8,), masks="multiblock,causal")
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
    tubelets = vjepa.to_tubelets(torch.rand(1, 3, 8, 20, 20), 2, 4)
    keep = torch.arange(0, 100, 3)[None]
    changed = tubelets.clone()
    changed[:, 1::3] += 1
    assert torch.equal(model.encoder(tubelets, keep), model.encoder(changed, keep))


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
    tubelets = vjepa.to_tubelets(window, 2, 4)
    close(model.encoder(tubelets, keep), g["win_context"])
    close(model(tubelets, keep, keep + 32)[0], g["win_pred"])
    chosen = tensor(g["rand_keep_idx"], torch.long)
    close(model.encoder(tubelets, chosen), g["rand_keep_feat"])


def test_pixel_targets():
    g, s = golden("pixel_targets"), golden("surprise")
    window = windows_of(s["quad_videos"][0][0])[:1]
    close(vjepa.pixel_targets(vjepa.to_tubelets(window, 2, 4))[0], g["window0_targets"])
    row = 0
    for quad, pairs in zip(s["quad_videos"], s["quad_matches"].tolist(), strict=True):
        for j in (j for pair in pairs for j in pair):  # the released branch predicts zeros
            targets = vjepa.pixel_targets(vjepa.to_tubelets(windows_of(quad[j]), 2, 4)).abs()
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
            (column,) = [k for k, c in enumerate(columns) if "rel" in c.lower() and word in c.lower()]
            close(accuracy[i], expected[:, column], atol=1e-3)
            (column,) = [k for k, c in enumerate(columns) if "auroc" in c.lower() and word in c.lower()]
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
