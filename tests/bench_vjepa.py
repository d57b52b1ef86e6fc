"""Speed of vjepa.py: its training step beside a plain one, and reading clips beside decoding every frame.

    python tests/bench_vjepa.py                      # the toy preset's step
    python tests/bench_vjepa.py --steps 30 --width 192 --heads 3
    python tests/bench_vjepa.py --decode DIR         # clips read a second and core, from a folder of videos

Both steps run in turn, twice, each in a process of its own; the better of the two counts, since other load only slows.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import av  # noqa: E402
from bench import block_work, explicit_attention, matmul_peak  # noqa: E402

import common  # noqa: E402
import vjepa  # noqa: E402


def work(config, contexts, targets):
    """FLOPs a clip of a step: target encoder forward; for each kind, encoder and predictor on its tokens, trained."""
    c, pixels, n = config, 3 * config.tubelet * config.patch**2, np.prod(vjepa.grid_of(config))
    trained = 0
    for k, kp in zip(contexts, targets, strict=True):
        trained += k * pixels * c.width + c.depth * block_work(k, c.width) + k * c.width * c.predictor_width
        trained += (c.predictor_depth - 1) * block_work(k + kp, c.predictor_width)
        trained += block_work(k + kp, c.predictor_width, kp) + kp * c.width * c.predictor_width
    return 2 * (3 * trained + n * pixels * c.width + c.depth * block_work(n, c.width))


def plain_masks(config, step):
    """[context, targets, ...] like `vjepa.sample_masks` of one group, drawn sample by sample as the reference does."""
    grid, masks = vjepa.grid_of(config), []
    for name, blocks, scale in vjepa.mask_kinds(config):
        pairs, cut = [], int(torch.randint(1, grid[0] - 1, (1,)))
        size = vjepa.block_size(step, grid, (scale, scale), config.mask_aspect) if blocks else None
        while len(pairs) < config.batch:
            mask = torch.ones(grid, dtype=torch.int32)
            if name == "time":
                mask[cut:] = 0
            for _ in range(blocks):
                top, left = (int(torch.randint(0, g - s + 1, (1,))) for g, s in zip(grid[1:], size[1:], strict=True))
                mask[:, top : top + size[1], left : left + size[2]] = 0
            if mask.any():
                pairs.append([(mask.flatten() == v).nonzero()[:, 0] for v in (1, 0)])
        for part in zip(*pairs, strict=True):
            shortest = min(map(len, part))
            masks.append(torch.stack([indices[:shortest] for indices in part]))
    return masks


def plain(config, steps):
    """The straightforward step: whatever `vjepa.py` does differently to be faster, the obvious way. Prints JSON."""
    torch.manual_seed(0)
    F.scaled_dot_product_attention = explicit_attention
    model, target = vjepa.build(config)
    encoder, predictor = model.encoder, model.predictor
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False, fused=False)
    speeds = []

    def take(x, mask):
        """Gather with an index as large as what is gathered."""
        return x.gather(1, mask[:, :, None].expand(-1, -1, x.shape[-1]))

    for step in range(steps):
        begin = time.monotonic()
        rows = [vjepa.toy_clip("train", step * config.batch + i, config, (0, step, i)) for i in range(config.batch)]
        clips = vjepa.normalize(torch.from_numpy(np.stack(rows))).transpose(1, 2)
        masks, losses = plain_masks(config, step), []
        with torch.no_grad():
            h = F.layer_norm(target(clips), (config.width,))
        for i, (keep, asked) in enumerate(zip(masks[::2], masks[1::2], strict=True)):
            x = take(encoder.patch_embed.proj(clips).flatten(2).transpose(1, 2) + encoder.pos_embed, keep)
            for block in encoder.blocks:
                x = block(x)
            positions = predictor.predictor_pos_embed.repeat(config.batch, 1, 1)
            x = predictor.predictor_embed(encoder.norm(x)) + take(positions, keep)
            x = torch.cat([x, predictor.mask_tokens[i] + take(positions, asked)], dim=1)
            for block in predictor.predictor_blocks:
                x = block(x)
            z = predictor.predictor_proj(predictor.predictor_norm(x)[:, keep.shape[1] :])
            losses.append((z - take(h, asked)).abs().mean())
        torch.stack(losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for a, b in zip(target.parameters(), encoder.parameters(), strict=True):
                a.mul_(0.99).add_(b * 0.01)
        torch.stack(losses).mean().item()
        speeds.append(config.batch / (time.monotonic() - begin))
    half = sorted(speeds[steps // 3 :])
    print(json.dumps(dict(speed=half[len(half) // 2], memory=common.memory_gib(torch.device("cpu")))))


def ours(flags, steps):
    """The script as users run it, from the command line: speed, memory and masks from its own log."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, ROOT / "vjepa.py", *flags, "--steps", steps, "--log-every", max(1, steps // 6)]
        command += ["--eval", "none", "--save-every", 10**9, "--out", out, "--physics-count", 1]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "clips_per_s" in row][2:]
    speed = sorted(row["clips_per_s"] for row in rows)[len(rows) // 2]
    return dict(speed=speed, memory=rows[-1]["memory_gib"], masks=[(r["context"], r["target"]) for r in rows])


def bench_step(flags, steps):
    """Print the table of both steps."""
    config = common.parse_config(vjepa.Config, vjepa.PRESETS, vjepa.DATA_PRESETS, flags)
    device = common.start_world(config.device).device
    found = {"ours": [], "plain": []}
    for _ in range(2):
        found["ours"].append(ours(flags, steps))
        command = [sys.executable, __file__, "--plain", "--steps", str(max(6, steps // 3)), *flags]
        found["plain"].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    best = {kind: max(runs, key=lambda run: run["speed"]) for kind, runs in found.items()}
    flops = np.mean([work(config, *masks) for masks in best["ours"]["masks"]])
    peak = matmul_peak(common.choose_precision(config.precision, device), device)
    print("| step | clips/s | peak memory, GiB | share of matmul peak |\n|---|---|---|---|")
    for kind, row in best.items():
        print(f"| {kind} | {row['speed']:.1f} | {row['memory']:.2f} | {100 * flops * row['speed'] / peak:.0f} % |")
    print(f"\n{best['ours']['speed'] / best['plain']['speed']:.2f} times the plain step")


def bench_decode(folder, seconds=8.0, clips=2):
    """Print clips/s of one core: `vjepa.read_frames`, and a decoder that starts at frame 0 and keeps every frame."""
    torch.set_num_threads(1)
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in vjepa.VIDEOS)
    config = vjepa.Config(frames=16, step=4)

    def seeking(path, draws):
        return vjepa.read_frames(path, vjepa.clip_chooser(config, clips, True, draws), (256, 256))[0]

    def from_the_start(path, draws):
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        indices = vjepa.clip_chooser(config, clips, True, draws)(np.arange(len(frames)) / 25)
        chosen = torch.from_numpy(np.stack([frames[i] for i in indices.flatten()])).permute(0, 3, 1, 2).float()
        return F.interpolate(chosen, (256, 256), mode="bilinear", antialias=True)

    speeds = {}
    for name, read in (("ours", seeking), ("decode all", from_the_start)) * 2:
        begin, done = time.process_time(), 0
        while time.process_time() - begin < seconds / 4:
            path = paths[done % len(paths)]
            read(path, vjepa.random_generator("bench", done))
            done += 1
        speeds[name] = max(speeds.get(name, 0.0), done * clips / (time.process_time() - begin))
    line = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    print(f"{len(paths)} videos, {clips} clips of 16 frames each, clips a second of one core: {line}")


def main():
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", help="a folder of videos: measure only how fast clips are read")
    parser.add_argument("--steps", type=int, default=18, help="steps of each measurement")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.decode:
        bench_decode(args.decode)
    elif args.plain:
        plain(common.parse_config(vjepa.Config, vjepa.PRESETS, vjepa.DATA_PRESETS, flags), args.steps)
    else:
        bench_step(flags, args.steps)


if __name__ == "__main__":
    main()
