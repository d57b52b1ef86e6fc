"""vjepa.py against the reference implementation's numbers (tests/golden/vjepa) and against its own promises."""

import json
import math
import random
import shutil
import signal
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
from helpers import log_rows, run_several
from PIL import Image

import common
import vjepa
from common import OldWorld as World
from vjepa import Config

GOLDEN = Path(__file__).parent / "golden" / "vjepa"
ALONE = World(0, 1, torch.device("cpu"))
TINY = dict(heads=2, frames=8)


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=1e-5, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual, expected = torch.as_tensor(actual).detach().double(), tensor(expected, torch.float64)
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def load(name="tiny_vjepa", **known):
    """(model, target, config) of an official-layout tiny checkpoint."""
    path = GOLDEN / f"{name}.pth.tar"
    weights = vjepa.read_checkpoint(path, **known)
    config = replace(Config(), **weights["architecture"])
    model, target = vjepa.build(config)
    vjepa.load_weights(model, target, weights, path)
    return model, target, config


def load_rope(frames=8):
    return load("tiny_vjepa_rope", heads=1, frames=frames, image_size=16)


def main(*flags, code=None):
    """Call the command line in this process, with its signal handlers undone; expect to leave with `code`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if code is None:
            return vjepa.main(list(map(str, flags)))
        with pytest.raises(SystemExit) as stop:
            vjepa.main(list(map(str, flags)))
        assert stop.value.code == code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


SMALL = "--width 16 --depth 2 --heads 2 --predictor-width 16 --predictor-depth 2 --batch 8 --log-every 1 --device cpu"
SMALL = [*SMALL.split(), "--no-compile"]


# ----------------------------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    for name in ("u24", "n24", "u20", "u384", "u1024"):
        width, side, times, uniform = g[f"{name}_args"].tolist()
        if uniform:
            table = common.old_sincos_3d(width, times, side, side)
        else:  # no released model: time gets half, rows and columns a quarter each
            axes = np.mgrid[:times, :side, :side].reshape(3, -1)
            parts = [common.old_sincos_1d(w, a) for w, a in zip((width // 2, width // 4, width // 4), axes)]
            table = torch.cat(parts, dim=1)
        close(table, g[name], atol=1e-6)


def test_rotary_positions():
    g = golden("rope")
    grid = (4, 3, 3)
    for width in (80, 64, 24, 16):
        cosine, sine, partner = vjepa.rotary_table(width, grid, torch.device("cpu"))
        ids = tensor(g["ids"], torch.long)
        np.testing.assert_array_equal(np.stack(np.unravel_index(g["ids"][0], grid)), g["dhw"])
        turned = vjepa.rotate(tensor(g[f"q_{width}"]), cosine[ids][:, None], sine[ids][:, None], partner)
        close(turned, g[f"rot_{width}"], atol=1e-6)
        a = width // 3
        close(10000.0 ** (-2 * torch.arange(a // 2) / a), g[f"freqs_{width}"], atol=1e-7)


def test_forward_loss_gradients_and_ema():
    g = golden("forward")
    model, target, config = load(**TINY)
    img, patch, frames, tubelet, width, depth, heads, predictor_width, predictor_depth, batch = g["dims"].tolist()
    assert (config.image_size, config.patch, config.frames, config.tubelet) == (img, patch, frames, tubelet)
    assert (config.width, config.depth, config.predictor_width) == (width, depth, predictor_width)
    video = tensor(g["video"])
    masks = [tensor(g[f"mask_{k}_{i}"], torch.long)[None] for i in (0, 1) for k in ("enc", "pred")]
    close(model.encoder(video), g["encoder_full"])
    tokens = target(video).detach()
    close(tokens[:, ::3], g["target_full_every3"])
    normed = F.layer_norm(tokens, tokens.shape[-1:])
    close(torch.stack([normed.mean(), normed.std()]), g["target_normed_mean_std"])
    targets = vjepa.gather_targets(tokens, masks)
    patches = model.encoder.patch_embed.patchify(video)
    for i in (0, 1):
        close(model.encoder(patches, masks[2 * i][0]), g[f"context_{i}"])
        close(targets[i][:, :6], g[f"targets_{i}_head"])
    predictions = model(patches, masks)
    close(predictions[0], g["pred_0"])
    close(predictions[1][:, ::3], g["pred_1"])
    close(model(patches, masks[:2], tokens=[1])[0], g["pred_0_with_mask_token_1"])
    for i in (0, 1):
        close(vjepa.vjepa_loss(predictions[i : i + 1], targets[i : i + 1]), g["loss_per_mask"][i], atol=1e-6)
    close(vjepa.prediction_spread(predictions), g["pred_std_reg"])
    loss = vjepa.vjepa_loss(predictions, targets)
    close(loss, g["loss"], atol=1e-6)
    loss.backward()
    named = {f"{part}.backbone.{n}": p for part in ("encoder", "predictor")
             for n, p in getattr(model, part).named_parameters()}  # fmt: skip
    close(torch.stack([named[n].grad.norm() for n in g["grad_names"]]), g["grad_norms"], rtol=1e-4, atol=1e-9)
    assert {n for n, p in named.items() if p.grad is not None} == set(g["grad_names"])
    for part in ("encoder", "predictor"):
        close(common.old_gradient_norm(list(getattr(model, part).parameters())), g[f"grad_total_{part}"], rtol=1e-4)
    ema = common.OLD_EMA(target, model.encoder)
    ema.update(0.998)
    close(target.blocks[0].attn.qkv.weight, g["ema_qkv0"], atol=1e-6)


def test_another_size_interpolates_positions(capsys):
    g = golden("forward")
    model, _, _ = load(**TINY)
    video = F.interpolate(tensor(g["video_big_lowres"]), scale_factor=(1, 8, 8))
    close(vjepa.interpolate_table(model.encoder.pos_embed, (4, 5, 5), (5, 6, 6))[:, ::5], g["pos_embed_big"])
    close(model.encoder(video)[:, ::7], g["encoder_full_big"])
    assert vjepa.interpolate_table(torch.zeros(1, 11**3, 2), (11, 11, 11), (15, 15, 15)).shape == (1, 15**3, 2)
    encoder = vjepa.load_encoder(GOLDEN / "tiny_vjepa.pth.tar", image_size=24, **TINY)
    assert "interpolated from 4x5x5 to 4x6x6" in capsys.readouterr().out
    assert encoder(video[:, :, :8]).shape == (1, 144, 16)


def test_schedules():
    g = golden("schedules")
    for name in ("paper", "small"):
        ipe, epochs, warmup, scale, start_lr, lr, final_lr, wd, final_wd, ema0, ema1 = g[f"{name}_args"]
        config = Config(warmup=warmup / epochs, lr=lr, lr_start=start_lr, lr_final=final_lr, schedule_scale=scale,
                        weight_decay=wd, weight_decay_final=final_wd, momentum=ema0, momentum_final=ema1)  # fmt: skip
        ours = np.array([vjepa.schedules(config, int(i), int(ipe * epochs)) for i in g[f"{name}_iter"]])
        for i, key in enumerate(("lr", "wd", "ema")):
            np.testing.assert_allclose(ours[:, i], g[f"{name}_{key}"], rtol=0, atol=1e-12)
    preset = replace(Config(), **vjepa.PRESETS["vit_l16"])
    lr, decay, momentum = vjepa.schedules(preset, int(g["paper_iter"][0]), preset.steps)
    np.testing.assert_allclose([lr, decay, momentum], [g[f"paper_{k}"][0] for k in ("lr", "wd", "ema")], atol=1e-12)


def test_attentive_probe():
    g, f = golden("probe"), golden("forward")
    probe = vjepa.load_probe(GOLDEN / "tiny_probe.pth.tar", heads=2)
    tokens = tensor(g["tokens"])
    close(probe.pooler(tokens), g["pooled"])
    logits = probe(tokens)
    close(logits, g["logits"])
    loss = F.cross_entropy(logits, tensor(g["labels"], torch.long))
    close(loss, g["loss"], atol=1e-6)
    loss.backward()
    named = dict(probe.named_parameters())
    norms = [0.0 if named[n].grad is None else named[n].grad.norm().item() for n in g["grad_names"]]
    np.testing.assert_allclose(norms, g["grad_norms"], rtol=1e-4, atol=1e-7)
    _, target, _ = load(**TINY)
    two = target(tensor(f["video"])).flatten(0, 1)[None]  # two clips of one video, one after the other
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
        np.testing.assert_array_equal(vjepa.clip_indices(*arguments, draw=np.random.randint), g[f"case{k}_random"])


def test_crops_and_evaluation_transform():
    g = golden("transforms")
    random.seed(7)
    sizes = [(240, 320)] * 12 + [(360, 202)] * 12
    ours = [vjepa.random_crop(h, w, (0.3, 1.0), (0.75, 1.35), random) for h, w in sizes]
    np.testing.assert_array_equal(ours, g["crops_pre"])
    for name, aspect in (("full", (0.5, 2.0)), ("eval1", (1.0, 1.0))):
        np.testing.assert_array_equal([vjepa.centre_crop(h, w, aspect) for h, w in sizes], g[f"crops_{name}"])
    video = torch.from_numpy(g["video_uint8"]).permute(0, 3, 1, 2)[None]
    for name, aspect in (("1to1", (1.0, 1.0)), ("inflevel", (0.5, 2.0))):
        box = torch.tensor([vjepa.centre_crop(*video.shape[-2:], aspect)]).float()
        clip = vjepa.normalize(vjepa.crop_resize(video, box, 16))[0].transpose(0, 1)  # [3, T, 16, 16]
        close(clip[:, :1], g[f"voe_eval_{name}"], atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ masks

SETTINGS = {
    "vitl16_short": ((8, 14, 14), 8, (0.15, 0.15), (1.0, 1.0), (0.75, 1.5), 1.0),
    "vitl16_long": ((8, 14, 14), 2, (0.7, 0.7), (1.0, 1.0), (0.75, 1.5), 1.0),
    "tiny_short": ((4, 8, 8), 8, (0.15, 0.15), (1.0, 1.0), (0.75, 1.5), 1.0),
    "tiny_long": ((4, 8, 8), 2, (0.7, 0.7), (1.0, 1.0), (0.75, 1.5), 1.0),
    "partial_causal": ((4, 8, 8), 3, (0.2, 0.5), (0.4, 0.9), (0.5, 2.0), 0.5),
}


def reference_blocks(grid, size, blocks):
    """One sample's corners, in the reference's order of draws, as the uniforms that give the same corners."""
    room = [grid[1] - size[1] + 1, grid[2] - size[2] + 1, grid[0] - size[0] + 1]
    corners = [[torch.randint(0, n, (1,)).item() for n in room] for _ in range(blocks)]
    return [[(time + 0.5) / room[2], (top + 0.5) / room[0], (left + 0.5) / room[1]] for top, left, time in corners]


def reference_visible(name, counter, batch):
    """bool [B, N] from torch's own generator, drawn sample by sample and made by the batched code."""
    grid, blocks, scale, temporal, aspect, context = SETTINGS[name]
    size, rows = vjepa.block_size(counter, grid, scale, aspect, temporal), []
    while len(rows) < batch:
        uniform = torch.tensor([reference_blocks(grid, size, blocks)], dtype=torch.float64)
        row = vjepa.outside_blocks(uniform, size, grid, context)
        rows += [row] if row.any() else []
    return torch.cat(rows)


@pytest.mark.parametrize("name", SETTINGS)
def test_golden_masks_from_the_batched_code(name):
    """Given the reference's draws, the batched code makes the same blocks and the same lists, of the same length."""
    g = golden("masks")
    grid, _, scale, temporal, aspect, _ = SETTINGS[name]
    sizes = [vjepa.block_size(k, grid, scale, aspect, temporal) for k in range(24)]
    np.testing.assert_array_equal(sizes, g[f"{name}_block_sizes"])
    batch, seed = g["args"].tolist()
    torch.manual_seed(seed)
    for call in (0, 1):
        keep, asked = vjepa.cut_masks(reference_visible(name, call, batch))
        if f"{name}_enc_{call}" in g:
            expected = g[f"{name}_enc_{call}"]
            np.testing.assert_array_equal(keep[0][:, :20] if name == "partial_causal" else keep[0], expected)
        if f"{name}_pred_{call}" in g:
            np.testing.assert_array_equal(asked[0], g[f"{name}_pred_{call}"])
        elif f"{name}_pred_count_{call}" in g:
            assert asked.shape[-1] == g[f"{name}_pred_count_{call}"]


@pytest.mark.parametrize("name", ["vitl16_short", "vitl16_long", "tiny_short", "tiny_long"])
def test_batched_sampler_has_the_reference_statistics(name):
    g = golden("masks")
    grid, blocks, scale, *_ = SETTINGS[name]
    config = Config(image_size=grid[1] * 8, frames=grid[0] * 2, masks="multiblock", mask_blocks=(blocks,),
                    mask_scales=(scale[0],), batch=24)  # fmt: skip
    mean, std, low, high = g[f"{name}_stat_keep_mean_std_min_max"]
    draws, lengths, cut = 4000, [], []
    hits = torch.zeros(grid[1] * grid[2])
    for step in range(150):
        masks = vjepa.sample_masks(config, step)[0]
        cut.append([m.shape[-1] for m in masks])
        for keep, _ in (vjepa.sample_masks(replace(config, batch=4, group=1), step)[i] for i in range(4)):
            lengths.append(keep.shape[-1])
            hits += torch.bincount(keep[0, 0] % len(hits), minlength=len(hits)) / grid[0]
    error = np.std(lengths) * math.sqrt(1 / len(lengths) + 1 / draws)
    assert abs(np.mean(lengths) - mean) < 4 * error and low <= min(lengths) and max(lengths) <= high + 4 * grid[0]
    assert np.mean(lengths) / math.prod(grid) == pytest.approx(1 - g[f"{name}_stat_mask_ratio_mean"], abs=0.02)
    for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), g[f"{name}_stat_keep_quantiles"], strict=True):
        assert np.mean(np.less(lengths, value)) - 0.08 < share < np.mean(np.less_equal(lengths, value)) + 0.08
    probability = hits.view(grid[1:]) / len(lengths)
    assert np.abs(probability.numpy() - g[f"{name}_stat_keep_prob_hw"]).max() < 0.1
    np.testing.assert_allclose(np.mean(cut, axis=0), g[f"{name}_stat_batch24_enc_mean_pred_mean"], rtol=0.12)
    assert std == pytest.approx(np.std(lengths), rel=0.15)


def test_exact_statistics_of_single_draws():
    """The reference's own 4000 draws of one setting, made again: every statistic to the last digit."""
    g, name = golden("masks"), "tiny_short"
    torch.manual_seed(int(g["args"][1]) + 1)
    visible = torch.cat([reference_visible(name, counter, 1) for counter in range(4000)])
    kept = visible.sum(1).double().numpy()
    np.testing.assert_allclose(
        [kept.mean(), kept.std(), kept.min(), kept.max()], g[f"{name}_stat_keep_mean_std_min_max"]
    )
    close(visible.view(-1, 4, 8, 8).double().mean((0, 1)), g[f"{name}_stat_keep_prob_hw"], atol=1e-6)
    name = "partial_causal"
    torch.manual_seed(int(g["args"][1]) + 2)
    cut = [[min(m.shape[-1], limit) for m, limit in zip(vjepa.cut_masks(reference_visible(name, k, 24)), (20, 999))]
           for k in range(150)]  # fmt: skip
    np.testing.assert_allclose(np.mean(cut, axis=0), g[f"{name}_stat_batch24_enc_mean_pred_mean"], rtol=1e-9)


def test_other_kinds_of_masks():
    g = golden("masks")
    config = Config(image_size=112, frames=16, batch=8, masks="tube,random,time,causal")
    tube, tube_hidden, some, hidden, first, rest, causal, _ = (m[0] for m in vjepa.sample_masks(config, 0)[0])
    assert tube.shape[1] == g["tube_enc"].shape[1] and tube_hidden.shape[1] == g["tube_pred_count"]
    places = tube.view(8, 8, -1)
    assert (places - 196 * torch.arange(8)[None, :, None] == places[:, :1]).all(), "the same places at all times"
    assert (np.diff(g["tube_enc"].reshape(2, 8, -1), axis=1) == 196).all(), "as the reference's"
    assert some.shape[1] == 156 and hidden.shape[1] == 1568 - 156
    assert (torch.cat([first, rest], dim=1) == torch.arange(1568)).all() and first.shape[1] % 196 == 0
    assert {vjepa.sample_masks(config, t)[0][4].shape[-1] // 196 for t in range(60)} == set(range(1, 7))
    assert causal.max() < 6 * 196
    window = golden("surprise")["time_mask_enc_len_pred_len"]
    assert [[c // 2 * 196, (16 - c) // 2 * 196] for c in (2, 4, 6, 8, 10)] == window.tolist()


def test_masks_do_not_depend_on_who_asks():
    config = Config(batch=64, group=16, seed=3, masks="multiblock,random,time,tube,causal", mask_blocks=(8, 2),
                    mask_scales=(0.15, 0.7), image_size=64)  # fmt: skip
    whole = vjepa.sample_masks(config, 7)
    assert len(whole) == 4 and len(whole[0]) == 2 * len(vjepa.mask_kinds(config)) == 14
    for first, last in ((0, 32), (32, 64), (16, 32), (40, 44)):
        for ours, theirs in zip(vjepa.sample_masks(config, 7, first, last), whole[first // 16 :], strict=False):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = vjepa.sample_masks(replace(config, seed=4), 7)
    assert not torch.equal(other[0][2], whole[0][2])


# ---------------------------------------------------------------------------------------------------------- physics


def upsample(video):
    """[..., T, 4, 4] -> [..., T, 16, 16], nearest."""
    return tensor(video).repeat_interleave(4, -1).repeat_interleave(4, -2)


def windows_of(video, frames=8):
    return upsample(video).unfold(1, frames, 2).permute(1, 0, 4, 2, 3)  # [W, 3, frames, 16, 16]


def test_surprise():
    g = golden("surprise")
    model, target, config = load_rope()
    contexts = tuple(g["context_lengths"].tolist())
    videos, row = g["quad_videos"], 0
    for quad, pairs in zip(videos, g["quad_matches"].tolist(), strict=True):
        frames = [tensor(v).transpose(0, 1) for v in quad]  # [T, 3, 4, 4]
        found, parting = vjepa.match_quadruplet(frames)
        q = row // 4
        assert found == pairs and parting == g["quad_breaking_points"][q].tolist()
        for j in (j for pair in found for j in pair):
            assert g["quad_labels"][q][j] == g["quad_surprise_labels"][row]
            for name, normed in (("quad_surprise", False), ("quad_surprise_normalize_context", True)):
                ours = vjepa.surprise(model, target, windows_of(quad[j]), contexts, 4, 2, 0, normed)
                close(ours, g[name][row])
            row += 1
    assert row == len(g["quad_surprise"])
    row = 0
    for p in range(3):
        for video in g[f"pair_videos_{p}"]:
            ours = vjepa.surprise(model, target, windows_of(video), contexts, 4, 2)
            close(F.pad(ours, (0, 5 - ours.shape[1])), g["pair_surprise"][row])
            row += 1
    window = windows_of(videos[0][0])[:1]
    close(target(window), g["win_target"])
    close(model.encoder(window), g["win_encoder_nomask"])
    keep = torch.arange(32)[None, None]
    close(model.encoder(model.encoder.patch_embed.patchify(window), keep[0]), g["win_context"])
    predicted = model(model.encoder.patch_embed.patchify(window), [keep, keep + 32])[0]
    close(predicted, g["win_pred"])
    chosen = tensor(g["rand_keep_idx"], torch.long)
    close(model.encoder(model.encoder.patch_embed.patchify(window), chosen), g["rand_keep_feat"])


def test_pixel_targets():
    g, s = golden("pixel_targets"), golden("surprise")
    video = windows_of(s["quad_videos"][0][0])[:1]
    patches = common.OldPatchEmbed(4, 8, tubelet=2).patchify(video)
    close(vjepa.pixel_targets(patches)[0], g["window0_targets"])
    contexts, row = s["context_lengths"].tolist(), 0
    for quad, pairs in zip(s["quad_videos"], s["quad_matches"].tolist(), strict=True):
        for j in (j for pair in pairs for j in pair):  # the released branch predicts zeros: mean |target| of the future
            windows = windows_of(quad[j])
            targets = vjepa.pixel_targets(common.OldPatchEmbed(4, 8, tubelet=2).patchify(windows)).abs()
            ours = torch.stack([targets[:, c // 2 * 16 :].mean((1, 2)) for c in contexts])
            close(ours, g["surprise_zero_predictions"][row])
            row += 1
    assert np.isfinite(g["surprise_real_predictions_random_mae"]).all()  # of weights that were not shipped


def test_physics_metrics():
    g = golden("metrics")
    for name in ("a", "b", "c"):
        losses, labels = g[f"{name}_losses"].astype(np.float32), g[f"{name}_labels"]
        ours = vjepa.physics_metrics(losses, labels)
        np.testing.assert_allclose(ours, g[f"{name}_metrics"], atol=1e-3, err_msg=name)
        surprises = vjepa.aggregate(losses)
        for kind, word in (("max", "maximum"), ("avg", "average")):
            np.testing.assert_allclose(1 - surprises[kind][-1], g[f"{name}_test_{word}_surprise"], atol=1e-5)
    assert len(g["names"]) == len(vjepa.METRICS)
    padded = np.concatenate([losses, np.full((*losses.shape[:2], 2), np.nan)], axis=2)
    np.testing.assert_allclose(vjepa.physics_metrics(padded, labels), ours, atol=1e-6)


def test_intervals_cover():
    """Of 95 % intervals of a share of pairs, about 95 % hold the truth; all right gives no width."""
    draws = np.random.default_rng(0).random((200, 60)) < 0.8
    intervals = [vjepa.bca_interval(lambda w, x=x: w @ x / w.sum(1), 60, resamples=500) for x in draws.astype(float)]
    assert 0.88 < np.mean([low <= 0.8 <= high for low, high in intervals]) < 0.99
    assert vjepa.bca_interval(lambda w: w.sum(1) / w.sum(1), 10) == (1.0, 1.0)


def test_more_frames_only_add_rows_to_the_table():
    model, target, config = load(**TINY)
    longer, _, own = vjepa.with_frames(model, target, config, 12)
    assert own.frames == 12 and longer.encoder.pos_embed.shape[1] == 150
    torch.testing.assert_close(longer.encoder.pos_embed[:, :100], model.encoder.pos_embed)
    video = torch.rand(1, 3, 12, 20, 20)
    assert vjepa.surprise(longer, longer.encoder, video, (4, 8), 4, 2).shape == (2, 1)


# ------------------------------------------------------------------------------------------------------- toy world

MEMORY = [p for p in vjepa.PROPERTIES if p != "gravity"]


def quads(name, count, first=0):
    """[count, 4, 38, 3, 32, 32]: possible, impossible, possible, impossible."""
    scenes = [vjepa.Scene(name, (5, first + i)) for i in range(count)]
    return np.stack([[s.video(q) for q in vjepa.quadruplet(s)] for s in scenes])


@pytest.mark.parametrize("name", vjepa.PROPERTIES)
def test_possible_and_impossible_videos_are_made_of_the_same_frames(name):
    for possible, impossible, other, wrong in quads(name, 6):
        for a, b in ((possible, impossible), (other, wrong)):
            assert sorted(f.tobytes() for f in a) == sorted(f.tobytes() for f in b)
            assert any((x != y).any() for x, y in zip(a, b, strict=True))
    if name == "gravity":
        return
    scene = vjepa.Scene(name, (5, 0))
    assert (scene.draw("screen", 0, 1.0) == scene.draw("screen", 1, 1.0)).all(), "a full screen hides the state"
    assert (scene.draw("screen", 0, 2 / 3) != scene.draw("screen", 1, 2 / 3)).any()
    for possible, impossible, other, wrong in quads(name, 3):
        assert (possible[:10] == impossible[:10]).all(), "a pair begins alike"
        for stride in (1, 2):  # of the windows' starts
            for n in (1, 2, 5):  # full + 1
                starts = range(0, 38 - n + 1, stride)
                grams = [Counter(v[t : t + n].tobytes() for t in starts) for v in (possible, impossible, other, wrong)]
                assert grams[0] + grams[2] == grams[1] + grams[3], (n, stride)
    assert grams[0] != grams[1]


def test_frames_alone_do_not_give_the_answer_away():
    """Classifiers of single frames, of a frame's mean, and of all frames in shuffled order stay at chance."""
    train, test = (np.concatenate([quads(p, 12, first) for p in vjepa.PROPERTIES]) for first in (0, 50))
    labels = torch.tensor([1, 0, 1, 0]).repeat(len(train))
    r = np.random.default_rng(0)

    def views(videos):
        small = torch.from_numpy(videos.reshape(-1, 38, 3, 8, 4, 8, 4).mean((4, 6))).float().flatten(2) / 128 - 1
        shuffled = torch.stack([v[torch.from_numpy(r.permutation(38))] for v in small])
        return {"frame": shuffled[:, 0], "statistics": torch.cat([small.mean(1), small.std(1)], 1),
                "shuffled": shuffled[:, ::4].flatten(1)}  # fmt: skip

    seen, unseen = views(train), views(test)
    for name, x in seen.items():
        weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        for _ in range(150):
            loss = F.binary_cross_entropy_with_logits(x @ weight[1:] + weight[0], labels.float())
            optimizer.zero_grad()
            (loss + 1e-3 * weight.square().sum()).backward()
            optimizer.step()
        right = ((unseen[name] @ weight[1:] + weight[0] > 0) == (labels == 1)).float().mean().item()
        assert abs(right - 0.5) < 0.12, f"{name}: {right}"  # 288 videos: a standard error of 0.03


def test_toy_clips_are_legal_and_reproducible():
    config = Config()
    for index in range(12):
        a, b = (vjepa.toy_clip("train", index, config, (0, "x", index)) for _ in range(2))
        assert a.shape == (16, 3, 32, 32) and a.dtype == np.uint8 and (a == b).all()
    r, scene, seen = np.random.default_rng(0), vjepa.Scene("continuity", (0, 1)), set()
    for _ in range(300):
        symbols = vjepa.walk(scene, 16, r)
        assert len(symbols) == 16
        known = None
        for kind, value, *height in symbols:
            if kind == "change":
                known = None
            elif not (height and height[0] == 1.0):
                assert known is None or known == value, "the state changed out of sight"
                known = value
            seen.add(kind)
    assert seen == {"state", "change", "screen"}
    lifts = {kind for _ in range(100) for kind, *_ in vjepa.walk(vjepa.Scene("gravity", (0, 1)), 16, r)}
    assert lifts == {"state", "change", "lift"}


def test_a_random_network_is_at_chance_on_toy_physics():
    config = Config(physics_count=3, width=16, depth=2, heads=2, predictor_width=16, precision="fp32")
    model, target = vjepa.build(config)
    found = vjepa.measure(model, target, vjepa.find_trials(config), config, ALONE, common.OldLog("out", ALONE))
    assert list(found) == list(vjepa.PROPERTIES)
    for name, measured in found.items():
        assert measured.losses.shape == (12, 4, 12)
        assert abs(vjepa.summarise(measured)["filtered"] - 50) <= (17 if name == "gravity" else 0.1), name


def test_measure_tells_possible_from_impossible():
    """With a network that is surprised by what is impossible, all pairs are right: nothing swaps rows or labels."""
    config = Config(physics_count=1, precision="fp32")
    trials = vjepa.find_trials(config)
    wrong = {v.numpy().tobytes() for t in trials for v, label in zip(t.load(), t.labels, strict=True) if not label}

    def oracle(model, target, video, *_):
        return torch.full((4, 12), 1.0 if video.numpy().tobytes() in wrong else 0.5).double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vjepa, "video_surprise", oracle)
        found = vjepa.measure(None, None, trials, config, ALONE, common.OldLog("out", ALONE))
    for measured in found.values():
        summary = vjepa.summarise(measured)
        assert summary["best"] == 100 and summary["auroc"] == 1.0


# ------------------------------------------------------------------------------------------------------------ videos


def numbered(number, size):
    """A frame uint8 [H, W, 3] that says its number: ten bits as stripes, light or dark; a red bar says where up is."""
    height, width = size
    bits = np.array([number >> k & 1 for k in range(10)]).repeat(width // 10 + 1)[:width]
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = (bits * 160 + 40)[None, :, None]
    frame[: height // 4] = (255, 0, 0)
    return frame


def read_number(frame):
    """The number that a decoded frame [3, H, W] says."""
    width = frame.shape[2]
    stripe = width // 10 + 1
    return sum(int(frame[2, -2, k * stripe + min(stripe, width - k * stripe) // 2] > 120) << k for k in range(10)
               if k * stripe < width - 1)  # fmt: skip


def write_video(path, count, size=(32, 40), codec="mpeg4", stamps=None, gop=12, rate=25):
    """A video of numbered frames; stamps: their times in 1/1000 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.gop_size = gop
        if codec == "mpeg4":
            stream.codec_context.max_b_frames = 2
            stream.codec_context.bit_rate = 2_000_000
        if stamps is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(i, size), format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_frames_are_the_ones_asked_for(name, tmp_path):
    """Seeking to key frames, several clips in one pass, B-frames: always the same frames as decoding all."""
    path = write_video(tmp_path / name, 100)
    r = np.random.default_rng(0)
    for indices in (np.arange(100), np.array([[97, 98, 99]]), np.array([0]), r.integers(0, 100, (3, 5)),
                    np.array([[50, 51, 52], [3, 3, 70]]), np.array([11, 12, 13, 36])):  # fmt: skip
        frames, size = vjepa.read_frames(path, lambda times, indices=indices: indices)
        assert frames.shape == (*indices.shape, 3, 32, 40) and size == (32, 40)
        assert [read_number(f) for f in frames.flatten(0, -4)] == indices.flatten().tolist()


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path, seen = write_video(tmp_path / "a.mp4", 100), []
    decode = vjepa.decode_stamps

    def counted(container, *rest):
        class Counted:
            def seek(self, *args, **kwargs):
                container.seek(*args, **kwargs)

            def decode(self, stream):
                for frame in container.decode(stream):
                    seen.append(frame.pts)
                    yield frame

        return decode(Counted(), *rest)

    monkeypatch.setattr(vjepa, "decode_stamps", counted)
    vjepa.read_frames(path, lambda times: np.array([[97, 99], [49, 50]]))
    assert len(seen) <= 2 * 12 + 4, "two groups of pictures, not all hundred frames"


def test_variable_frame_rate_is_sampled_by_time(tmp_path):
    stamps = np.concatenate([np.arange(0, 2000, 40), np.arange(2000, 4000, 200)]).tolist()  # 25, then 5 frames a second
    path = write_video(tmp_path / "a.mkv", len(stamps), stamps=stamps)
    config = Config(fps=5, frames=20)
    frames, _ = vjepa.read_frames(path, vjepa.clip_chooser(config))
    shown = np.array(stamps)[[read_number(f) for f in frames[0]]]
    assert np.abs(np.diff(shown) - 200).max() <= 80, shown
    times = np.array([0.0, 0.1, 0.2, 1.0])
    np.testing.assert_array_equal(vjepa.at_rate(times, 10), [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3])


def test_short_odd_and_turned_videos(tmp_path):
    short = write_video(tmp_path / "short.mp4", 3)
    frames, _ = vjepa.read_frames(short, vjepa.clip_chooser(Config(step=4), clips=2))
    assert frames.shape[:2] == (2, 16) and {read_number(f) for f in frames.flatten(0, 1)} <= {0, 1, 2}
    odd = write_video(tmp_path / "odd.mkv", 5, size=(27, 35), codec="ffv1")
    frames, size = vjepa.read_frames(odd, lambda times: np.arange(5))
    assert size == (27, 35) and [read_number(f) for f in frames] == list(range(5))
    assert vjepa.read_frames(odd, lambda times: np.arange(2), (16, 16))[0].shape == (2, 3, 16, 16)
    data = bytearray(write_video(tmp_path / "turned.mp4", 3).read_bytes())
    at = data.index(b"tkhd") + 44
    numbers = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # a camera held upright: a quarter turn clockwise
    data[at : at + 36] = struct.pack(">9i", *numbers)
    (tmp_path / "turned.mp4").write_bytes(data)
    frames, size = vjepa.read_frames(tmp_path / "turned.mp4", lambda times: np.arange(1))
    assert size == (40, 32) and frames.shape == (1, 3, 40, 32)
    red = (frames[0, 0] > 180) & (frames[0, 2] < 90)
    assert red[:, 26:].float().mean() > 0.9 and red[:, :20].float().mean() < 0.1, "what was up is right"
    small, _ = vjepa.read_frames(tmp_path / "turned.mp4", lambda times: np.arange(1), (20, 16))
    assert small.shape == (1, 3, 20, 16)


def write_sound(path):
    """A file with sound only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def broken_videos(folder):
    """Paths of videos that cannot be read, each in its own way."""
    whole = write_video(folder / "whole.mp4", 40).read_bytes()
    (folder / "whole.mp4").unlink()
    files = {"cut.mp4": whole[: len(whole) // 2], "empty.mp4": b"", "text.mp4": b"hello" * 100,
             "noise.avi": np.random.default_rng(0).bytes(5000), "photo.mkv": b"\xff\xd8\xff" + bytes(500)}  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    write_sound(folder / "sound.mp4")
    with av.open(str(folder / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    cut = write_video(folder / "half.avi", 60, gop=100).read_bytes()
    (folder / "half.avi").write_bytes(cut[: len(cut) // 2])  # its index says less than what it holds, or nothing
    return [folder / name for name in (*files, "sound.mp4", "none.avi")]


def test_broken_videos_are_skipped_counted_and_limited(tmp_path, capsys):
    data = tmp_path / "videos"
    broken = broken_videos(data)
    for path in broken:
        with pytest.raises(vjepa.UNREADABLE):
            vjepa.read_frames(path, lambda times: np.arange(len(times)))
    write_video(data / "good.mp4", 20)
    shutil.copy(data / "good.mp4", data / "wrong-name.avi")  # what a file holds counts, not its name
    assert len(vjepa.read_frames(data / "wrong-name.avi", lambda times: np.arange(len(times)))[0]) == 20
    flags = [*SMALL, "--data", data, "--preset", "toy", "--frames", 4, "--eval", "none", "--steps", 3, "--workers", 0]
    main(*flags, "--out", "stopped", code=2)
    assert "--max-bad" in capsys.readouterr().err
    main(*flags, "--out", "skipped", "--max-bad", 1)
    printed = capsys.readouterr().out
    assert all(f"skipped an unreadable file: {path}" in printed for path in broken)
    assert torch.load("skipped/last.pt", weights_only=True)["step"] == 3
    for name in ("good.mp4", "wrong-name.avi", "half.avi"):
        (data / name).unlink()
    main(*flags, "--out", "none", "--max-bad", 1, code=2)
    assert "100 videos in a row" in capsys.readouterr().err


def test_training_and_frozen_evaluation_on_labelled_videos(tmp_path, capsys):
    """A labelled folder and csv lists; kNN and the probe with several clips and views; several workers, threads."""
    for split in ("train", "val"):
        for i in range(6):
            size = (32, 44) if i % 2 else (44, 32)
            write_video(tmp_path / "data" / split / ("up", "down")[i % 2] / f"{i}.mp4", 12 + i, size)
    lists = {}
    for split in ("train", "val"):
        lists[split] = tmp_path / f"{split}.csv"
        lines = (f"data/{split}/{('up', 'down')[i % 2]}/{i}.mp4 {i % 2}" for i in range(6))
        lists[split].write_text("\n".join(lines) + "\n")
    flags = [*SMALL, "--preset", "folder", "--frames", 4, "--image-size", 32, "--patch", 8, "--group", 0, "--step", 2,
             "--eval", "knn,probe", "--steps", 2, "--probe-batch", 4, "--probe-epochs", 2, "--fps", 8]  # fmt: skip
    more = ["--probe-clips", 2, "--probe-views", 3, "--workers", 2, "--threads", 2]
    main(*flags, "--data", tmp_path / "data", "--out", "folder", *more)
    main(*flags, "--data", lists["train"], "--val", lists["val"], "--out", "lists", *more, "--no-baselines")
    folder, from_lists = (log_rows(out)[-1]["eval"] for out in ("folder", "lists"))
    assert folder["trained"].keys() == folder["random"].keys() == {"knn10", "knn20", "knn100", "probe"}
    assert folder["pixels"].keys() == {"knn10", "knn20", "knn100"} and from_lists.keys() == {"trained"}
    assert Image.open("folder/picture.png").width > 200 and "top-1" in capsys.readouterr().out
    main(*flags, "--data", f"{lists['train']},{lists['val']}", "--out", "both", "--eval", "features",
         "--features-split", "train")  # fmt: skip
    found = np.load("both/features.npz")
    assert found["features"].shape == (12, 16) and list(found["labels"]) == [0, 1] * 6


def test_official_checkpoint_in_features_and_probe_out(tmp_path):
    tiny, data = GOLDEN / "tiny_vjepa.pth.tar", tmp_path / "data"
    for split in ("train", "val"):
        for i in range(5):
            write_video(data / split / "abcde"[i] / f"{i}.mkv", 8, size=(20, 20), codec="ffv1")
    flags = ["--init", tiny, "--heads", 2, "--frames", 8, "--data", data, "--step", 1, "--device", "cpu", "--tokens"]
    flags += ["--eval", "features,probe", "--probe-init", GOLDEN / "tiny_probe.pth.tar", "--probe-clips", 1]
    main(*flags, "--features-out", "1.npz", "--out", "one")
    physics = [*SMALL, "--steps", 1, "--eval", "physics", "--no-baselines", "--physics-count", 1]
    main(*physics, "--out", "physics-1")
    lines = [[*flags, "--features-out", "2.npz", "--out", "two"], [*physics, "--out", "physics-2"]]
    run_several(*(["vjepa", *line] for line in lines), ranks=2)
    one, two = (log_rows(f"physics-{n}")[-1]["physics"]["trained"] for n in (1, 2))
    for name in vjepa.PROPERTIES:
        a, b = (found[name]["metrics"]["filtered"] for found in (one, two))
        assert a.keys() == b.keys() and a["threshold"] is b["threshold"] is None, "no threshold from two pairs"
        assert [a[k] for k in a if a[k]] == pytest.approx([b[k] for k in b if b[k]], rel=1e-4)
    encoder = vjepa.load_encoder(tiny, heads=2, frames=8)
    for name in ("1", "2"):
        found = np.load(f"{name}.npz")
        assert found["features"].shape == (5, 16) and found["tokens"].shape == (5, 100, 16)
        assert list(found["labels"]) == list(range(5)) and found["paths"][0] == "val/a/0.mkv"
        choose = vjepa.clip_chooser(Config(frames=8), 1, True)
        video, _ = vjepa.read_frames(data / "val" / "a" / "0.mkv", choose)  # [1, 8, 3, 20, 20]
        tokens = vjepa.encode(encoder, video[None])[0]
        np.testing.assert_allclose(found["tokens"][0], tokens, atol=1e-5)
        np.testing.assert_allclose(found["features"][0], tokens.mean(0), atol=1e-5)
    one, two = (log_rows(out)[-1]["eval"]["trained"]["probe"] for out in ("one", "two"))
    assert one == two


def test_official_checkpoints_that_do_not_tell_enough(capsys):
    for name, known, words in (("tiny_vjepa", dict(frames=8), "--heads"), ("tiny_vjepa", dict(heads=2), "--frames")):
        with pytest.raises(SystemExit):
            vjepa.read_checkpoint(GOLDEN / f"{name}.pth.tar", **known)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vjepa.load_probe(GOLDEN / "tiny_vjepa.pth.tar", 2)
    assert "classifier" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- physics data sets

WINDOWS = ["--physics-frames", 4, "--physics-contexts", 2, "--frames", 4, "--eval", "physics", "--no-baselines"]


def moved(count, start, height=20, width=24, jump=None):
    """A video uint8 [T, H, W, 3] of a bright square that moves to the right, and jumps back at frame `jump`."""
    video = np.full((count, height, width, 3), 30, np.uint8)
    for t in range(count):
        x = (start + t) % (width - 6) if jump is None or t < jump else (start + t + 7) % (width - 6)
        video[t, 6:12, x : x + 6] = 220
    return video


def write_frames(path, video):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = (*video.shape[1:3], "yuv420p")
        stream.codec_context.bit_rate = 4_000_000
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_intphys_layout_and_submission(tmp_path):
    for part, labelled in (("dev", True), ("test", False)):
        for block in ("O1", "O3"):
            for scene in ("01", "02"):
                videos = [moved(21, 0), moved(21, 0, jump=9), moved(21, 3), moved(21, 3, jump=9)]
                for k, video in enumerate([videos[i] for i in (0, 3, 2, 1)]):
                    folder = tmp_path / part / part / block / scene / str(k + 1)
                    (folder / "scene").mkdir(parents=True)
                    for t, frame in enumerate(video):
                        Image.fromarray(frame).save(folder / "scene" / f"scene_{t + 1:03d}.png")
                    if labelled:
                        status = {"header": {"is_possible": k in (0, 2)}}
                        (folder / "status.json").write_text(json.dumps(status))
    main(*SMALL, *WINDOWS, "--steps", 1, "--out", "dev", "--physics", tmp_path / "dev")
    results = log_rows("dev")[-1]["physics"]["trained"]
    assert results.keys() == {"O1", "O3"} and results["O1"]["pairs"] == 4
    config = Config(physics=str(tmp_path / "dev"))
    trial = vjepa.find_trials(config)[0]
    videos = trial.load()
    assert len(videos[0]) == 10 and trial.labels == [1, 0, 1, 0]  # (21 - 1) // 2
    assert vjepa.match_quadruplet(videos)[0] == [[0, 3], [1, 2]], "those that begin alike"
    main("--init", "dev/last.pt", *WINDOWS[2:4], "--eval", "physics", "--physics-frames", 4, "--device", "cpu",
         "--physics", tmp_path / "test", "--out", "test")  # fmt: skip
    for word in ("average", "maximum"):
        lines = Path(f"test/{word}_surprise_answer.txt").read_text().splitlines()
        assert len(lines) == 16 and lines[0].startswith("O1/01/1 ")
        assert all(0 <= float(line.split()[1]) <= 1 for line in lines)


def test_grasp_and_inflevel_layouts(tmp_path, capsys):
    for prefix, jump in (("P", None), ("IP", 20)):
        for name in ("Collision", "SolidityContinuity2"):
            for i in range(2):
                write_frames(tmp_path / "grasp" / "level2" / f"{prefix}_{name}" / f"{i}.mp4", moved(41, i, jump=jump))
    main(*SMALL, *WINDOWS, "--steps", 1, "--out", "grasp", "--physics", tmp_path / "grasp", "--image-size", 24)
    results = log_rows("grasp")[-1]["physics"]["trained"]
    assert results.keys() == {"Collision", "SolidityContinuity2"} and results["Collision"]["pairs"] == 2
    printed = capsys.readouterr().out
    assert "solidity" in printed and "continuity" in printed and "collision" in printed
    names = {"continuity": ("vv", "vi"), "solidity": ("ui", "uv"), "gravity": ("ci", "cv")}
    for folder, kinds in names.items():
        for kind, jump, extra in zip(kinds, (None, 20), (0, 3), strict=True):
            video = np.concatenate([moved(extra + 10, 0), moved(30, 2, jump=jump)])
            write_frames(tmp_path / "inf" / folder / f"left__{folder}__cup__ball__{kind}.mp4", video)
    root, trial_of = tmp_path / "inf", lambda: vjepa.find_trials(Config(physics=str(tmp_path / "inf")))
    by_name = trial_of()
    assert [t.name for t in by_name] == list(names) and by_name[0].titles[0].endswith("vv.mp4")
    a, b = by_name[0].load()
    assert len(a) == len(b) == 8  # 40 frames, every fifth
    header = ",".join(f"vid{i}_{k}" for i in (1, 2) for k in ("path", "start_priming_1", "end_priming_1",
                                                             "start_priming_2", "end_priming_2", "label"))  # fmt: skip
    for folder, kinds in names.items():
        paths = [f"{folder}/left__{folder}__cup__ball__{kind}.mp4" for kind in kinds]
        row = ",".join(f"{p},0,2,3,{end},{k}" for p, end, k in zip(paths, (9, 12), ("p", "i"), strict=True))
        (root / f"{folder}.csv").write_text(f"{header}\n{row}\n")
    a, b = trial_of()[0].load()
    assert len(a) == len(b) == 6  # the 30 frames after priming
    differences = (a.float() - b.float()).abs().mean((1, 2, 3))
    assert differences[:4].max() < 0.3 * differences[4:].min(), "they part after 20 frames"
    main(*SMALL, *WINDOWS, "--steps", 1, "--out", "inf", "--physics", root, "--image-size", 24)
    assert log_rows("inf")[-1]["physics"]["trained"].keys() == set(names)
    (tmp_path / "strange").mkdir()
    main(*SMALL, *WINDOWS, "--steps", 1, "--out", "x", "--physics", tmp_path / "strange", code=2)
    assert "GRASP" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- runs


def test_pixel_control_rotary_network_and_pictures(capsys):
    """The control trains and stands in the same table; rotary networks resume; both pictures are drawn."""
    flags = [*SMALL, "--steps", 3, "--physics-count", 1, "--eval", "physics"]
    main(*flags, "--out", "pixels", "--target", "pixels")
    state = torch.load("pixels/last.pt", weights_only=True)
    for name, weight in state["target"].items():
        torch.testing.assert_close(weight, state["model"][f"encoder.{name}"])
    rope = [*flags, "--rope", "--heads", "1", "--masks", "multiblock,causal,random,tube,time"]
    main(*rope, "--out", "rope", "--pixels", "pixels/last.pt", "--accumulate", 2)
    physics = log_rows("rope")[-1]["physics"]
    assert physics.keys() == {"trained", "random", "pixel"}
    assert all(found.keys() == set(vjepa.PROPERTIES) for found in physics.values())
    assert capsys.readouterr().out.count("surprise of the ") == 5
    short = [*SMALL, "--steps", 3, "--eval", "none", "--rope", "--heads", 1, "--save-every", 1, "--physics-count", 1]
    main(*short, "--out", "whole")
    make, calls = vjepa.make_clips, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vjepa, "make_clips", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(*short, "--out", "parts")
    assert torch.load("parts/last.pt", weights_only=True)["step"] == 2
    main(*short, "--out", "parts", "--resume")
    a, b = (torch.load(f"{out}/last.pt", weights_only=True)["model"] for out in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with Image.open("rope/surprise.gif") as movie:
        durations = []
        for i in range(movie.n_frames):  # frames that are alike are stored once, and last longer
            movie.seek(i)
            durations.append(movie.info["duration"])
    assert sum(durations) == 38 * 150
    picture = np.asarray(Image.open("rope/picture.png"))
    assert picture.shape[1] > 1000 and picture.std() > 20


def test_gradients_are_clipped_apart_and_after_the_warmup(monkeypatch):
    clip, seen = torch.nn.utils.clip_grads_with_norm_, []

    def watched(parameters, limit, norm):
        clip(parameters, limit, norm)
        seen.append((len(parameters), common.old_gradient_norm(parameters).item()))

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", watched)
    monkeypatch.setattr(vjepa, "report", lambda *_: None)
    main(*SMALL, "--steps", 4, "--warmup", 0.5, "--clip", 1e-5, "--eval", "none", "--out", "clipped")
    assert len(seen) == 4 and seen[0][0] != seen[1][0], "encoder and predictor, in the last two of four steps"
    assert all(norm == pytest.approx(1e-5, rel=0.02) for _, norm in seen), seen


def test_context_only_is_encoded():
    """The encoder sees visible tokens only: the others' pixels change nothing."""
    model, _, config = load(**TINY)
    video = torch.rand(1, 3, 8, 20, 20)
    patches = model.encoder.patch_embed.patchify(video)
    keep = torch.arange(0, 100, 3)[None]
    changed = patches.clone()
    changed[:, 1::3] += 1
    assert torch.equal(model.encoder(patches, keep), model.encoder(changed, keep))
    asked = torch.arange(1, 100, 3)[None]
    assert torch.equal(*(model(p, [keep[None], asked[None]])[0] for p in (patches, changed)))


def test_vjepa_learns():
    """In a minute on toy videos: what is in view is expected to stay, what is predicted depends on the clip, and the
    target does not collapse. (That hidden things stay, which makes the physics, takes 1,000 steps.)"""
    main("--steps", 200, "--eval", "none", "--physics-count", 1, "--out", "learnt", "--device", "cpu", "--no-compile")
    rows = log_rows("learnt")
    assert next(row["content_ratio"] for row in rows if "content_ratio" in row) > 1.5
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.1 and last["feature_rank"] > 3, "collapsed"
    model, target, config = vjepa.load_all("learnt/last.pt", Config(), ALONE)
    right = []
    for name in ("continuity", "colour", "solidity"):
        for number in range(20):
            scene, state = vjepa.Scene(name, (2, number)), number % 2
            stays, swaps = ([("state", s)] * 8 for s in (state, 1 - state))
            pair = torch.from_numpy(np.stack([scene.video(stays + end) for end in (stays, swaps)]))
            clips = vjepa.normalize(pair.flatten(0, 1)).unflatten(0, (2, 16)).transpose(1, 2)
            token = vjepa.surprise_token(config)
            ((possible, impossible),) = vjepa.surprise(model, target, clips, (8,), config.patch, config.tubelet, token)
            right.append(bool(possible < impossible))
    assert np.mean(right) > 0.7, f"{np.mean(right)} of 60 pairs right: chance 0.5, standard error 0.06"
