"""vjepa.py against the reference implementation's numbers (golden/vjepa) and its own promises."""

import itertools
import json
import random
import struct
import wave
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, compare, golden_tensors, log_rows, norms, run_several
from PIL import Image
from test_runs import SCRIPTS, here, learn, refused

import common
import vjepa
from vjepa import Config

# the authors' tiny networks
TINY = "--preset toy --image-size 20 --patch 4 --frames 8 --width 16 --depth 2 --heads 2 "
TINY += "--predictor-width 12 --predictor-depth 1 --masks multiblock --mask-blocks 8 2 "
TINY += "--mask-scales 0.15 0.7 "
ROPE = TINY + "--image-size 16 --depth 1 --heads 1 --rope"
SCRIPT = SCRIPTS["vjepa"]
WORLD = common.World()


def golden(name):
    return golden_tensors("vjepa", name)


def config_of(flags):
    """Return the Config that flags make."""
    return common.parse_config(Config, vjepa.PRESETS, vjepa.DATA_PRESETS, flags.split())[0]


def load(flags=TINY, name="tiny_vjepa"):
    """Return (config, model, target encoder) of an official-layout tiny checkpoint."""
    config = config_of(flags)
    weights = vjepa.read_weights(f"{GOLDEN}/vjepa/{name}.pth.tar")
    return config, *vjepa.load_networks(config, weights, WORLD)


# ----------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    for name in ("u24", "u20", "u384", "u1024"):
        width, side, times, _ = g[f"{name}_args"].tolist()
        close(vjepa.sincos_3d(width, (times, side, side))[0], g[name], atol=1e-6)


def test_rotary_positions():
    g = golden("rope")
    for width in (80, 64, 24, 16):
        turn = vjepa.rotary(width, g.ids, (4, 3, 3))
        close(turn(g[f"q_{width}"]), g[f"rot_{width}"], atol=1e-6)


def check_gradients(module, g, atol):
    """Compare the norms of all gradients with the authors', which have the authors' names."""
    expected = {}
    for name, norm in zip(g.grad_names, g.grad_norms, strict=True):
        *part, rest = name.split("backbone.")
        expected.update(vjepa.rename({rest: norm}, *part))
    assert expected.keys() == dict(module.named_parameters()).keys()
    close(norms(module, expected, gradients=True), [*expected.values()], rtol=1e-4, atol=atol)


def test_forward_loss_gradients_and_ema():
    g = golden("forward")
    config, model, target = load()
    masks = [g.mask_enc_0, g.mask_pred_0, g.mask_enc_1, g.mask_pred_1]
    hidden = masks[1::2]
    wanted = vjepa.targets_of(target, g.video, config)
    heads = [common.gather_tokens(wanted, places[:, :6]) for places in hidden]
    predictions = model(g.video, *masks)
    compare(
        g,
        atol=1e-5,
        encoder_full=model.encoder(g.video),
        target_full_every3=target(g.video)[:, ::3],
        target_normed_mean_std=torch.stack([wanted.mean(), wanted.std()]),
        context_0=model.encoder(g.video, masks[0]),
        context_1=model.encoder(g.video, masks[2]),
        targets_0_head=heads[0],
        targets_1_head=heads[1],
        pred_0=predictions[0],
        pred_1=predictions[1][:, ::3],
        pred_0_with_mask_token_1=model.predict(g.video, *masks[:2], kind=1),
    )
    loss = vjepa.vjepa_loss(predictions, wanted, hidden)
    both = zip(predictions, hidden, strict=True)
    losses = [vjepa.vjepa_loss([found], wanted, [places]) for found, places in both]
    compare(g, atol=1e-6, loss=loss, loss_per_mask=torch.stack(losses))
    loss.backward()
    check_gradients(model, g, atol=1e-9)
    totals = {}
    for name, part in model.named_children():
        totals[name] = torch.nn.utils.get_total_norm([p.grad for p in part.parameters()])
    compare(g, "grad_total_", rtol=1e-4, **totals)
    common.EMA(target, model.encoder).update(0.998, torch.ones(()))
    compare(g, atol=1e-6, ema_qkv0=target.blocks[0].attn.qkv.weight)


def test_another_size_interpolates_positions():
    """But for more frames, as in the released code, they are made afresh."""
    g = golden("forward")
    _, model, _ = load()
    table = vjepa.resample_positions(model.encoder.pos_embed, (4, 5, 5), (5, 6, 6))
    tokens = model.encoder(F.interpolate(g.video_big_lowres, scale_factor=(1, 8, 8)))
    compare(g, atol=1e-5, pos_embed_big=table[:, ::5], encoder_full_big=tokens[:, ::7])
    _, longer, _ = load(TINY + "--frames 12")
    close(longer.encoder.pos_embed, vjepa.sincos_3d(16, (6, 5, 5)))


def test_schedules():
    g = golden("schedules")
    fields = "schedule_scale lr_start lr lr_final weight_decay weight_decay_final momentum".split()
    for name in ("paper", "small"):
        per_epoch, epochs, warmup, *values, _ = g[f"{name}_args"].tolist()
        values = dict(zip(fields, values, strict=True))
        config = Config(steps=int(per_epoch * epochs), warmup=warmup / epochs, **values)
        if name == "paper":
            config = Config(**vjepa.PRESETS["vit_l16"])
        rows = [vjepa.schedules(config, int(i), config.steps) for i in g[f"{name}_iter"]]
        lr, decay, momentum = zip(*rows, strict=True)
        compare(g, f"{name}_", atol=1e-12, lr=lr, wd=decay, ema=momentum)


def test_attentive_probe():
    g = golden("probe")
    probe = vjepa.load_probe(f"{GOLDEN}/vjepa/tiny_probe.pth.tar", config_of(TINY))
    logits = probe(g.tokens)
    loss = F.cross_entropy(logits, g.labels)
    compare(g, atol=1e-5, pooled=probe.pool(g.tokens), logits=logits, loss=loss)
    loss.backward()
    check_gradients(probe, g, atol=1e-7)
    _, _, target = load()
    clips = golden("forward").video.transpose(1, 2)[None]  # two clips of one video
    tokens = vjepa.encode(target, clips)
    logits = probe(tokens)
    compare(
        g,
        "two_clip_",
        atol=1e-5,
        n=torch.tensor(tokens.shape),
        tokens_head=tokens[:, :3],
        tokens_tail=tokens[:, -3:],
        logits=logits,
        softmax=logits.softmax(1),
    )


def test_clip_indices():
    g = golden("clips")
    draws = SimpleNamespace(randrange=np.random.randint)
    for k, case in enumerate(g.cases.long().tolist()):
        length, frames, step, clips, overlap, seconds, rate = case
        if seconds > 0:
            step = seconds * rate // frames
        fixed = vjepa.clip_indices(length, frames, step, clips, overlap)
        np.random.seed(int(g.seed0) + k)
        drawn = vjepa.clip_indices(length, frames, step, clips, overlap, draws)
        compare(g, f"case{k}_", fixed=fixed, random=drawn)


def test_crops_and_evaluation_transform():
    g = golden("transforms")
    draws = random.Random(7)
    sizes = [(240, 320)] * 12 + [(360, 202)] * 12
    close([vjepa.random_crop(*size, (0.3, 1.0), draws) for size in sizes], g.crops_pre)
    video = g.video_uint8.permute(0, 3, 1, 2)
    kinds = (("full", "inflevel", (0.5, 2.0)), ("eval1", "1to1", (1.0, 1.0)))
    for crops, name, aspect in kinds:
        close([vjepa.centre_crop(*size, aspect) for size in sizes], g[f"crops_{crops}"])
        box = vjepa.centre_crop(18, 26, aspect)
        pixels = vjepa.crop_resize(video.float(), box, 16)
        close(vjepa.crop_resize(video, box, 16), pixels, atol=1)
        first = common.normalize(pixels).transpose(0, 1)[:, :1]
        close(first, g[f"voe_eval_{name}"], atol=1e-4)


# ------------------------------------------------------------------------------------------ masks

SETTINGS = {  # times, side, blocks, scale
    "vitl16_short": (8, 14, 8, 0.15),
    "vitl16_long": (8, 14, 2, 0.7),
    "tiny_short": (4, 8, 8, 0.15),
    "tiny_long": (4, 8, 2, 0.7),
}


def reference_visible(name, counter, batch):
    """Return bool [B, N] from torch's own generator, drawn clip by clip in the official order."""
    times, side, blocks, scale = SETTINGS[name]
    size = vjepa.block_size(counter, side, scale)
    rooms = [side - size[0] + 1, side - size[1] + 1, 1]
    draws = [torch.randint(room, ()) for _ in range(batch * blocks) for room in rooms]
    places = (torch.stack(draws).view(batch, blocks, 3) + 0.5) / torch.tensor(rooms)
    return vjepa.outside_blocks(places[..., :2], size, side).flatten(1).repeat(1, times)


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_from_the_reference_draws(name):
    """Given the reference's draws, the batched code makes the same blocks and the same lists."""
    g = golden("masks")
    times, side, _, scale = SETTINGS[name]
    sizes = [(times, *vjepa.block_size(k, side, scale)) for k in range(24)]
    close(sizes, g[f"{name}_block_sizes"])
    batch, seed = g.args.tolist()
    torch.manual_seed(seed)
    for call in (0, 1):
        visible, hidden = vjepa.cut(reference_visible(name, call, batch))
        found = {"enc": visible, "pred": hidden, "pred_count": torch.tensor(hidden.shape[1])}
        for key, value in found.items():
            if f"{name}_{key}_{call}" in g:
                close(value, g[f"{name}_{key}_{call}"])


def test_statistics_of_the_reference_draws():
    """The reference's own 4,000 draws of one setting, made again."""
    g = golden("masks")
    torch.manual_seed(int(g.args[1]) + 1)
    visible = torch.cat([reference_visible("tiny_short", k, 1) for k in range(4000)]).double()
    kept = visible.sum(1)
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()
    std, mean = torch.std_mean(kept, correction=0)
    compare(
        g,
        "tiny_short_stat_",
        atol=1e-6,
        keep_mean_std_min_max=torch.stack([mean, std, kept.min(), kept.max()]),
        keep_prob_hw=visible.view(-1, 8, 8).mean(0),
        keep_quantiles=kept.quantile(shares),
        mask_ratio_mean=1 - mean / 256,
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_own_draws_have_the_reference_statistics(name):
    g = golden("masks")
    times, side, blocks, scale = SETTINGS[name]
    flags = f"--image-size {side * 8} --frames {times * 2} --masks multiblock --seed 1 "
    flags += f"--mask-blocks {blocks} --mask-scales {scale} "
    config = config_of(flags + "--batch 24 --micro 24")
    lengths = [[m.shape[1] for m in vjepa.sample_masks(config, step)] for step in range(150)]
    close(np.mean(lengths, axis=0), g[f"{name}_stat_batch24_enc_mean_pred_mean"], rtol=0.12)
    config = config_of(flags + "--batch 4 --micro 1")
    masks = [vjepa.sample_masks(config, number)[0][0] for number in range(600)]
    kept = np.array([len(mask) for mask in masks])
    mean, std, *_ = g[f"{name}_stat_keep_mean_std_min_max"].tolist()
    assert kept.mean() == pytest.approx(mean, abs=4 * kept.std() / 600**0.5)
    assert kept.std() == pytest.approx(std, rel=0.15)
    counts = torch.bincount(torch.cat(masks) % side**2, minlength=side**2)
    close(counts.view(side, side) / (600 * times), g[f"{name}_stat_keep_prob_hw"], atol=0.1)


def test_other_kinds_of_masks():
    """Tube and random hide 90 %; time knows at most three quarters of the clip, causal no more."""
    g = golden("masks")
    config = config_of("--image-size 112 --batch 8 --micro 8 --masks tube,random,time,causal")
    drawn = [vjepa.sample_masks(config, number) for number in range(60)]
    lengths = [mask.shape[1] for mask in drawn[0][:4]]
    assert lengths == [g.tube_enc.shape[1], g.tube_pred_count, 156, 1568 - 156]
    tube, _, _, _, first, rest, *_ = drawn[0]
    places = tube.view(8, 8, -1) - 196 * torch.arange(8)[:, None]
    assert (places == places[:, :1]).all(), "the same places at all times"
    assert (torch.cat([first, rest], dim=1) == torch.arange(1568)).all()
    assert {masks[4].shape[1] / 196 for masks in drawn} == set(range(1, 7))
    assert max(masks[6].max() for masks in drawn) < 6 * 196


def test_each_mask_leaves_something_visible_and_hides_something():
    for scale in (0.02, 0.9, 1.0):
        flags = "--image-size 64 --masks multiblock --micro 8 --mask-blocks 8 --mask-scales"
        config = config_of(f"{flags} {scale}")
        for number in range(80):
            assert all(chosen.shape[1] for chosen in vjepa.sample_masks(config, number))


# ---------------------------------------------------------------------------------------- physics


def windows_of(video):
    """[3, T, 4, 4] -> windows of eight frames [W, 3, 8, 16, 16], enlarged."""
    large = F.interpolate(video, scale_factor=4)
    return large.unfold(1, 8, 2).permute(1, 0, 4, 2, 3)


def test_quadruplets_surprise_and_pixel_targets():
    g = golden("surprise")
    p = golden("pixel_targets")
    config, model, target = load(ROPE, "tiny_vjepa_rope")
    contexts = g.context_lengths.tolist()

    def surprise(video):
        row = vjepa.surprise(model, target, windows_of(video), contexts, config)
        return F.pad(row, (0, 5 - row.shape[1]))

    def zero_predictions(video):  # the released branch of the pixel control
        targets = vjepa.pixel_targets(windows_of(video), config).abs()
        return torch.stack([targets[:, 8 * context :].mean((1, 2)) for context in contexts])

    videos = []
    for q, quad in enumerate(g.quad_videos):
        pairs, parting = vjepa.match_quadruplet(quad.transpose(1, 2))
        compare(g, "quad_", at=q, matches=pairs, breaking_points=parting)
        videos += quad[pairs[0] + pairs[1]]
    compare(g, "quad_", atol=1e-5, surprise=torch.stack([*map(surprise, videos)]))
    zeros = torch.stack([*map(zero_predictions, videos)])
    compare(p, "surprise_", atol=1e-5, zero_predictions=zeros)
    videos = [*g.pair_videos_0, *g.pair_videos_1, *g.pair_videos_2]
    compare(g, "pair_", atol=1e-5, surprise=torch.stack([*map(surprise, videos)]))
    window = windows_of(g.quad_videos[0, 0])[:1]
    keep = torch.arange(32)[None]
    compare(
        g,
        atol=1e-5,
        win_target=target(window),
        win_encoder_nomask=model.encoder(window),
        win_context=model.encoder(window, keep),
        win_pred=model(window, keep, keep + 32)[0],
        rand_keep_feat=model.encoder(window, g.rand_keep_idx),
    )
    compare(p, atol=1e-5, window0_targets=vjepa.pixel_targets(window, config)[0])


@pytest.mark.parametrize("name", "abc")
def test_physics_metrics(name):
    """Relative accuracy and AUROC, of mean and largest surprise, at each context and filtered."""
    g = golden("metrics")
    losses = g[f"{name}_losses"].double()
    possible = g[f"{name}_labels"] == 1
    expected = dict(zip(g.names, g[f"{name}_metrics"].T, strict=True))
    both = torch.stack([vjepa.aggregate(row) for row in losses], dim=1)  # [2, videos, K + 1]
    names = [("avg", "average"), ("max", "maximum")]
    for (short, word), values in zip(names, both, strict=True):
        good = values[possible]
        bad = values[~possible]
        accuracy = 100 * (good < bad).double().mean(0)
        columns = zip(good.T, bad.T, strict=True)
        area = [vjepa.auroc(*column) for column in columns]
        close(accuracy, expected[f"Relative Accuracy ({short})"], atol=1e-3)
        close(area, expected[f"AUROC ({short})"], atol=1e-3)
        close(1 - values[:, -1], g[f"{name}_test_{word}_surprise"], atol=1e-5)
    pairs = list(zip(losses[possible], losses[~possible], strict=True))
    found = vjepa.summarise(pairs, range(losses.shape[1]))
    best = expected["Relative Accuracy (avg)"].max().item()
    assert found["best"] == pytest.approx(best)
    assert found["AUROC"] == pytest.approx(100 * area[-1])


def test_intervals_cover():
    """Of 95 % intervals of a share of pairs, about 95 % hold the truth; ties are errors."""
    possible = torch.zeros(1, 2)
    hits = []
    for row in np.random.default_rng(0).random((100, 60)):
        found = vjepa.summarise([(possible, possible + 0.8 - x) for x in row], [4])
        hits.append(found["from"] <= 80 <= found["to"])
    assert 0.85 < np.mean(hits) < 1
    tied = vjepa.summarise([(possible, possible)] * 10, [4])
    assert tied["best"] == 0 and tied["AUROC"] == 50


# -------------------------------------------------------------------------------------- toy world


def runs(videos, length, stride):
    """Count the runs of `length` frames that begin at every `stride`-th frame."""
    starts = range(0, 39 - length, stride)
    return Counter(video[t : t + length].tobytes() for video in videos for t in starts)


@pytest.mark.parametrize("name", vjepa.PROPERTIES)
def test_possible_and_impossible_videos_are_made_of_the_same_frames(name):
    """A pair begins alike and has the same frames, two pairs the same runs of up to five."""
    for number in range(4):
        scene = vjepa.make_scene(name, vjepa.dice("test", name, number))
        hidden, other = scene([(0, 1), (1, 1)])
        assert (hidden == other).all(), "a full screen hides the state"
        pairs = [[scene(story).numpy() for story in pair] for pair in vjepa.quadruplet()]
        for a, b in pairs:
            assert (a[:10] == b[:10]).all() and (a != b).any()
            assert runs([a], 1, 1) == runs([b], 1, 1)
        possible, impossible = zip(*pairs, strict=True)
        for length in (1, 2, 5):
            for stride in (1, 2):  # windows start at every second frame
                assert runs(possible, length, stride) == runs(impossible, length, stride)


def is_legal(story):
    """Tell whether the state changes in the open only."""
    known = None
    for phase, screen in story:
        if 0 < phase < 1:
            known = None
        elif screen < 1:
            if known not in (None, phase):
                return False
            known = phase
    return True


def test_toy_clips_are_legal_and_reproducible():
    """A micro-batch is a function of the seed and its number."""

    def draw(seed, number):
        split, *_ = opened("toy")
        config = Config(batch=10, micro=10, seed=seed)
        _, clips, visible, *_ = vjepa.make_micro_batch(split, config, number)
        return clips.numpy().tobytes(), visible.numpy().tobytes()

    first = draw(0, 3)
    assert draw(0, 3) == first
    for other in (draw(0, 4), draw(4, 3)):
        assert not set(first) & set(other)
    assert all(is_legal(vjepa.walk(vjepa.dice(number), 16)) for number in range(300))
    for possible, impossible in vjepa.quadruplet():
        assert is_legal(possible) and not is_legal(impossible)


def test_surprise_at_the_impossible_is_what_is_counted(monkeypatch, capsys):
    config = config_of(SCRIPT.small)
    short = torch.zeros(6, 3, 32, 32).byte()
    with pytest.raises(SystemExit):
        vjepa.video_surprise(None, None, short, [4], config, WORLD)
    assert "6 frames, less than a window of 16" in capsys.readouterr().err
    monkeypatch.setattr(vjepa, "QUADRUPLETS", 2)
    wrong = [pair[1] for _, pair in vjepa.toy_pairs(config)]

    def oracle(model, target, video, *_):
        return torch.full((4, 12), float(any(torch.equal(video, other) for other in wrong)))

    monkeypatch.setattr(vjepa, "video_surprise", oracle)
    run = common.Run(config, WORLD)
    shown = vjepa.evaluate_physics(None, config, WORLD, run)
    assert list(shown) == vjepa.PROPERTIES
    for found in log_rows(run.out)[-1]["physics"]["trained"].values():
        assert found["best"] == found["AUROC"] == 100


# ----------------------------------------------------------------------------------------- videos


def clip(count, first=0, change=1000):
    """Return numbered frames uint8 [32, 48, 3], all different, half as bright from `change` on."""
    frames = []
    for t in range(count):
        numbers = np.random.default_rng(first + t)
        coarse = numbers.integers(0, 255 if t < change else 127, (4, 6, 3), np.uint8)
        frames.append(coarse.repeat(8, 0).repeat(8, 1))
    return frames


STUB = b"\0\5\x16\7"  # of a file ._NAME, which macOS leaves beside NAME


def write_video(path, frames, codec="mpeg4", stamps=None, **options):
    """Write a video and its stub; stamps: times of its frames in ms; options: FFmpeg's."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"._{path.name}").write_bytes(STUB)
    unit = Fraction(1, 1000 if stamps else 25)
    options = {"g": "12", "bf": "2", **options}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = unit
        for stamp, frame in zip(stamps or range(len(frames)), frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = stamp
            picture.time_base = unit
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_pictures(folder, frames):
    """Write frames as 0.png, 1.png, ... and a stub."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")
    (folder / "._0.png").write_bytes(STUB)
    return folder


def decoded(path):
    """Return what a decoder gives from the start on, uint8 [T, 3, H, W]."""
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    return np.stack(frames).transpose(0, 3, 1, 2)


def check_frames(path, expected):
    """Assert that reading by numbers, one after the other or scattered, gives these frames."""
    _, frames = vjepa.list_frames(path)
    count = len(expected)
    assert len(frames) == count
    numbers = np.arange(count)
    scattered = np.random.default_rng(0).integers(0, count, (3, 5))
    for asked in (numbers, numbers[-3:], numbers[count // 2 :][:8], scattered):
        found = vjepa.read_frames(path, frames, asked)
        np.testing.assert_array_equal(found, expected[asked])


def opened(data, labelled=""):
    """Return the Videos of a data set: to train on, to evaluate on, not seen in training."""
    return vjepa.open_data(Config(data=data), labelled)


def videos(*paths, config=None, **options):
    """Return Videos of these files, all of one class."""
    labels = torch.zeros(len(paths), dtype=torch.long)
    return vjepa.Videos(paths, paths, labels, ["x"], config=config or Config(), **options)


STAMPS = [20 * i + i * i for i in range(60)]
CONTAINERS = {
    "a.mp4": {},
    "b.avi": {},
    "c.mkv": {},
    "d.ts": {"codec": "mpeg2video"},
    "e.mkv": {"stamps": STAMPS},
    "f.mp4": {"stamps": STAMPS},
    "g.ts": {"codec": "mpeg2video", "g": "100", "sc_threshold": "1000000000"},
    "h.mpg": {"codec": "mpeg2video"},
    "i.webm": {"codec": "libvpx"},
    "j.ts": {"codec": "libx264"},
    "k.h264": {"codec": "libx264"},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_frames_are_the_ones_asked_for(name):
    """Seeking, B-frames, any container: always the frames that decoding from the start gives."""
    try:
        path = write_video(name, clip(60), **CONTAINERS[name])
    except (ValueError, av.error.FFmpegError):
        pytest.skip("this PyAV cannot write it")
    check_frames(path, decoded(path))
    rate, _ = vjepa.list_frames(path)
    assert rate == 25 or "stamps" in CONTAINERS[name]


@pytest.mark.parametrize("skip", [5, 12, 31])
def test_frames_before_an_edit_list_do_not_exist(skip):
    path = write_video("a.mp4", clip(60))
    expected = decoded(path)[skip:]
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # duration in 1/1000 s, start in 1/12800 s
    duration, start = struct.unpack_from(">2i", data, at)
    struct.pack_into(">2i", data, at, duration - 40 * skip, start + 512 * skip)
    path.write_bytes(data)
    check_frames(path, expected)


def test_only_what_is_needed_is_decoded():
    """The last frames can be read although nine tenths before them are damaged."""
    path = write_video("a.mp4", clip(100))
    expected = decoded(path)[97:]
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 4
    end = 9 * data.index(b"moov") // 10
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    np.testing.assert_array_equal(vjepa.every(path, slice(97, None)), expected)
    with pytest.raises(ValueError):
        vjepa.every(path, slice(80, None))


DISPLAYS = {  # display matrix a b c d, and what it does to a picture [H, W, 3]
    "0 1 -1 0": lambda x: np.rot90(x, 3),
    "-1 0 0 -1": lambda x: np.rot90(x, 2),
    "0 -1 1 0": np.rot90,
    "-1 0 0 1": np.fliplr,
    "1 0 0 -1": np.flipud,
    "0 1 1 0": lambda x: x.swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", DISPLAYS)
def test_turned_and_mirrored_videos(matrix):
    path = write_video("a.mp4", clip(1))
    picture = decoded(path)[0].transpose(1, 2, 0)
    data = bytearray(path.read_bytes())
    a, b, c, d = (int(x) << 16 for x in matrix.split())
    struct.pack_into(">5i", data, data.index(b"tkhd") + 44, a, b, 0, c, d)
    path.write_bytes(data)
    check_frames(path, DISPLAYS[matrix](picture).transpose(2, 0, 1)[None])


def test_pictures_and_rates():
    folder = write_pictures("pictures", clip(12))
    check_frames(folder, np.stack(clip(12)).transpose(0, 3, 1, 2))
    path = write_video("long.mp4", clip(90))
    seconds = videos(path, config=config_of("--frames 8 --seconds 3.2"))
    steps = videos(path, config=config_of("--frames 8 --step 10"))
    assert torch.equal(seconds.read_clips(0, None), steps.read_clips(0, None))


def test_broken_videos_are_told_from_others():
    """What a file holds counts, not its name. All errors are of kinds that --physics catches."""
    good = write_video("good.mp4", clip(20)).read_bytes()
    files = {
        "wrong-name.avi": good,
        "cut.mp4": good[:1000],
        "empty.mp4": b"",
        "photo.mkv": b"\xff\xd8\xff" + bytes(500),
        "noise.avi": bytes(range(256)) * 20,
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    with wave.open("sound.mp4", "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(32000))
    whole, *broken = map(Path, [*files, "sound.mp4"])
    assert len(vjepa.every(whole, slice(None))) == 20
    for path in broken:
        with pytest.raises((OSError, LookupError, ValueError)):
            vjepa.every(path, slice(None))
    _, clips, bad = common.centre_crops(videos(*broken, clips=2), 32, [0, 1])
    assert clips.shape == (2, 2, 16, 3, 32, 32) and len(bad) == 2


def test_folders_of_pictures_are_videos():
    for name in ("train/up/1", "train/up/2", "train/down/1", "val/up/3"):
        write_pictures(f"data/{name}", clip(3))
    write_pictures("data/train/down", clip(1))
    write_video("data/train/up/2.mp4", clip(3))
    train, val, unseen = opened("data", "knn")
    names = "down/0.png down/1 up/1 up/2 up/2.mp4"
    assert train.images == [Path("data/train", name) for name in names.split()]
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
    assert unseen.images == val.images == [Path("data/val/up/3")]
    assert val.labels.tolist() == [1]
    flat, *_ = opened("data/train/up")
    assert len(flat) == 3 and not flat.classes
    write_pictures("stills/train", clip(4))
    assert len(opened("stills")[0]) == 4


LISTS = {
    "space": "my video, 1.mp4 0\nframes 2 1\n",
    "comma": "my video, 1.mp4,0\nframes 2,1\n",
    "tab": "my video, 1.mp4\t0\nframes 2\t1\n",
    "quotes": '"my video, 1.mp4",0\n"frames 2", 1\n',
    "header": "path,label\nmy video, 1.mp4,0\nframes 2,1\n",
    "mark": "\ufeffmy video, 1.mp4 0\r\nframes 2 1\r\n",
    "floats": "my video, 1.mp4 0.0\n\nframes 2 1.0\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists(kind):
    video = write_video("my video, 1.mp4", clip(3))
    folder = write_pictures("frames 2", clip(1))
    Path("list.csv").write_bytes(LISTS[kind].encode())
    split, *_ = opened("list.csv")
    assert split.images == [video, folder]
    assert split.labels.tolist() == [0, 1] and split.classes == ["0", "1"]
    assert split.read_clips(1, None).shape == (1, 16, 3, 32, 48)


WRONG_LISTS = {
    "0.mp4 0\n1.mp4\n2.mp4 1\n": "line 2",
    "0.mp4 dog\n": "line 1",
    "0.mp4\n": "line 1",
    "clip\n0.mp4 0\n": "line 1",
    "0.mp4 0\npath,label\n": "line 2",
    "": "no videos",
}


def test_lists_that_are_wrong(capsys):
    for text, words in WRONG_LISTS.items():
        Path("bad.csv").write_text(text)
        line = refused(capsys, SCRIPT, SCRIPT.folder, "--data bad.csv --steps 1")
        assert words in line and "path label" in line
    write_video("0.mp4", clip(3))
    write_video("1.mp4", clip(3))
    Path("a.csv").write_text("0.mp4 0\n1.mp4 1\n")
    Path("b.csv").write_text("1.mp4 2\n")
    flags = f"{SCRIPT.folder} --steps 1 --eval knn --data"
    assert "lacks" in refused(capsys, SCRIPT, flags, "a.csv --val b.csv")
    here(SCRIPT, flags, "a.csv,b.csv --val a.csv")
    assert "has no labels" in capsys.readouterr().out, "labels of several lists are not merged"


def test_crops_of_training_and_evaluation():
    """In training each clip has its own; evaluation sees the centre, or three squares."""
    picture = write_pictures("pictures", clip(1)) / "0.png"

    def training_clips(number, flip=False):
        config = Config(batch=1, micro=1, crop_scale=(0.08, 0.5), flip=flip)
        split = videos(picture, config=config, clips=2)
        return vjepa.make_micro_batch(split, config, number)[1][0]

    first, second = training_clips(1)
    assert not torch.equal(first, second)
    mirrored = set()
    for number in range(8):
        plain, _ = training_clips(number)
        other, _ = training_clips(number, flip=True)
        mirrored.add(torch.equal(other, plain.flip(-1)))
    assert mirrored == {True, False}
    frame = torch.from_numpy(clip(1)[0]).permute(2, 0, 1)[None]
    # the centre's side is 32 * 32 / 36
    expected = {None: vjepa.crop_resize(frame, (1, 9, 28, 28), 32)}
    for view in range(3):
        expected[view] = frame[..., 8 * view : 8 * view + 32]
    for view, pixels in expected.items():
        _, clips, _ = common.centre_crops(videos(picture, view=view), 32, [0])
        assert (clips[0, 0] == pixels).all()


# ------------------------------------------------------------------------------- weights and runs


def test_official_checkpoint_in_features_and_probe_out():
    """Of two ranks the same; kNN on features and pixels; a probe sees clips and views together."""
    names = itertools.product(("train", "val"), "abcde")
    for number, (split, label) in enumerate(names):
        frames = [frame[:20, :20] for frame in clip(8, 10 * number)]
        write_video(f"data/{split}/{label}/0.mp4", frames)
    flags = f"{TINY} --init {GOLDEN}/vjepa/tiny_vjepa.pth.tar --no-train --data data --device cpu "
    flags += f"--probe-init {GOLDEN}/vjepa/tiny_probe.pth.tar --probe-clips 2 --probe-views 3 "
    flags += "--eval features,knn,probe --out"
    here(SCRIPT, flags, "one")
    run_several(f"vjepa {flags} two", ranks=2)
    config, _, target = load()
    pixels = videos(Path("data/val/a/0.mp4"), config=config).read_clips(0, None)
    expected = target(common.normalize(pixels).transpose(1, 2)).mean(1)[0]
    accuracies = set()
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        assert list(found["labels"]) == list(range(5)) and found["paths"][0] == "val/a/0.mp4"
        close(found["features"][0], expected, atol=1e-5)
        results = log_rows(out)[-1]["eval"]
        assert results["trained"].keys() == results["random"].keys() == {"knn", "probe"}
        assert results["pixels"].keys() == {"knn"}
        accuracies.add(results["trained"]["probe"])
    assert len(accuracies) == 1


@pytest.mark.parametrize("name, batch, decay", [("a.png", 1024, 0.001), ("a.mp4", 256, 0.01)])
def test_probe_settings(name, batch, decay, monkeypatch):
    """Of image sets and of videos. No flips; the encoder runs under autocast."""
    decays = []

    def loader(make, numbers, config, world):
        assert config.batch == batch and not config.flip
        clips = torch.zeros(1, 1, 2, 3, 32, 32)
        return itertools.repeat((torch.tensor([0]), clips, []))

    def encoder(video):
        assert torch.is_autocast_enabled("cpu")
        return torch.zeros(1, 4, 64)

    monkeypatch.setattr(common, "make_loader", loader)
    monkeypatch.setattr(common, "set_rates", lambda _, lr, decay: decays.append(decay))
    config = Config(probe_epochs=1, flip=True)
    split = videos(*[Path(name)] * 2000, config=config)
    vjepa.train_probe(encoder, split, config, common.World(dtype=torch.bfloat16))
    assert decays[0] == decay


def write_intphys():
    """Write four scenes, in which videos 1 and 4, 2 and 3 begin alike, and 1 and 3 are possible."""
    for scene, part in itertools.product(("O1/01", "O1/02", "O3/01", "O3/02"), range(1, 5)):
        folder = Path("data/dev", scene, str(part))
        possible = part in (1, 3)
        frames = clip(40, 40 * (part in (2, 3)), 1000 if possible else 15)
        write_pictures(folder / "scene", frames)
        status = {"header": {"is_possible": possible}}
        (folder / "status.json").write_text(json.dumps(status))


def write_grasp():
    for name in ("Collision", "SolidityContinuity2"):
        for first in range(2):
            write_video(f"data/level2/P_{name}/{first}.mp4", clip(180, first))
            write_video(f"data/level2/IP_{name}/{first}.mp4", clip(180, first, 100))


def write_inflevel():
    """Write pairs whose priming, the first part, differs in length."""
    header = "vid1_path, vid1_end_priming_2, vid1_label, vid2_path, vid2_end_priming_2, vid2_label"
    for name in ("continuity", "gravity", "solidity"):
        possible, impossible = (f"{name}/left__{name}__{kind}.mp4" for kind in ("vv", "vi"))
        write_video(f"data/{possible}", clip(10) + clip(181, 2))
        write_video(f"data/{impossible}", clip(13) + clip(181, 2, 120))
        row = f"{possible}, 9, p, {impossible}, 12, i"
        Path(f"data/{name}_pairs.csv").write_text(f"{header}\n{row}\n")


# Writer; properties of its pairs; (frames, the first that differs); categories that are printed;
# (the file that is broken then, what the refusal says).
PHYSICS = {
    "intphys": (
        write_intphys,
        "O1 O1 O1 O1 O3 O3 O3 O3",
        (19, 8),
        "Permanence Continuity",
        ("data/dev/O1/02/4/status.json", "O1/02"),
    ),
    "grasp": (
        write_grasp,
        "Collision Collision SolidityContinuity2 SolidityContinuity2",
        (18, 10),
        "Solidity Continuity Collision",
        ("data/level2/IP_Collision/1.mp4", "cannot be read"),
    ),
    "inflevel": (
        write_inflevel,
        "continuity gravity solidity",
        (37, 24),
        "permanence",
        ("data/solidity/left__solidity__vi.mp4", "cannot be read"),
    ),
}


@pytest.mark.parametrize("name", PHYSICS)
def test_physics_data(name, capsys):
    """A possible video and its impossible one, alike up to a frame; results by property."""
    write, properties, (count, parting), categories, (broken, said) = PHYSICS[name]
    write()
    pairs = list(vjepa.physics_pairs(Config(physics=name, physics_data="data")))
    assert [key for key, _ in pairs] == properties.split()
    for _, (possible, impossible) in pairs:
        brighter = (possible.float() - impossible.float()).mean((1, 2, 3))
        assert len(brighter) == count
        assert brighter[:parting].abs().max() < 10 < brighter[parting:].min()
    flags = f"{SCRIPT.small} --steps 1 --image-size 24 --eval physics --physics {name} "
    flags += "--physics-data data"
    here(SCRIPT, flags, "--out out")
    assert log_rows("out")[-1]["physics"]["trained"].keys() == set(properties.split())
    printed = capsys.readouterr().out
    assert all(f"{category} " in printed for category in categories.split())
    # no video, nor the status of an impossible one
    Path(broken).write_text('{"header": {"is_possible": true}}')
    assert said in refused(capsys, SCRIPT, flags)


def test_pixel_control_and_rotary_network(monkeypatch):
    monkeypatch.setattr(vjepa, "QUADRUPLETS", 1)
    rotary = "--rope --heads 1 --masks multiblock,causal,random,tube,time"
    for out, flags in {"pixels": "--target pixels", "rotary": rotary}.items():
        here(SCRIPT, SCRIPT.small, flags, f"--eval physics --steps 2 --out {out}")
        assert log_rows(out)[-1]["physics"].keys() == {"trained", "random"}
    state = torch.load("pixels/last.pt", weights_only=True)
    for name, weight in state["target"].items():
        close(weight, state["model"][f"encoder.{name}"], atol=1e-7)


def test_gradients_are_clipped_apart_and_after_the_warmup(monkeypatch):
    clipped = []

    def clip(parameters, limit):
        clipped.append(len(list(parameters)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    here(SCRIPT, SCRIPT.small, "--steps 4 --warmup 0.5")
    model, _ = vjepa.build(config_of(SCRIPT.small))
    parts = [len(list(part.parameters())) for part in model.children()]
    assert clipped == parts * 2, "in two of four steps"


def test_vjepa_learns():
    """What is in view is expected to stay. (That hidden things stay too, takes 1,000 steps.)"""
    rows = learn(SCRIPT, "--steps 300 --eval none --workers 0")
    assert rows[-1]["feature_std"] > 0.1 and rows[-1]["feature_rank"] > 3, "collapsed"
    weights = vjepa.read_weights("learnt/last.pt")
    config = Config(**weights["fields"])
    networks = vjepa.load_networks(config, weights, WORLD)
    right = []
    for name, number in itertools.product(("continuity", "colour", "solidity"), range(20)):
        scene = vjepa.make_scene(name, vjepa.dice("learns", name, number))
        begin = [(number % 2, 0)] * 8
        swapped = [(1 - number % 2, 0)] * 8
        stays, swaps = (
            vjepa.video_surprise(*networks, scene(begin + end), [8], config, WORLD)
            for end in (begin, swapped)
        )
        right.append(bool(stays < swaps))
    assert np.mean(right) > 0.65, f"{np.mean(right)} of 60 pairs right: chance 0.5, error 0.06"
