"""Bench of flexpredict.py and iwm.py, in the terms of tests/bench.py: their work, plain steps, and IWM's jitter alone.

python tests/bench_predict.py [flexpredict] [iwm] [--steps 18] [flags of the script]
python tests/bench_predict.py --jitter                              # batched on one thread against PIL, image by image
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import bench  # noqa: E402
from reference import reference_masks  # noqa: E402

import common  # noqa: E402
import flexpredict  # noqa: E402
import iwm  # noqa: E402


def flexpredict_work(config, context, target):
    """FLOPs an image: I-JEPA's, and the noise through the predictor's first layer, forward and for its weight."""
    noise = config.targets * target * config.width * config.predictor_width
    return bench.ijepa_work(config, context, target) + 2 * 2 * noise * (config.mode != "ijepa")


def iwm_work(config, visible, hidden):
    """FLOPs an image of an IWM step: target encoder forward; source encoder and predictor forward and backward."""
    c, pixels = config, 3 * config.patch**2
    n, p = (c.image_size // c.patch) ** 2, c.predictor_width
    encoder = visible * pixels * c.width + c.depth * bench.block_work(visible, c.width)
    predictor = visible * c.width * p + hidden * (3 * p + iwm.ACTION) * p * (c.conditioning == "feature")
    predictor += (c.predictor_depth - 1) * bench.block_work(visible + hidden, p) + hidden * c.width * p
    predictor += bench.block_work(visible + hidden, p, hidden)
    return 2 * (3 * (encoder + predictor) + n * pixels * c.width + c.depth * bench.block_work(n, c.width))


class PlainStep:
    """What both plain steps share: explicit attention, one optimizer kernel a tensor, gathers with large indices."""

    def __init__(self, module, config):
        torch.manual_seed(0)
        F.scaled_dot_product_attention = bench.explicit_attention
        self.config, (self.model, self.target) = config, module.build(config)
        self.encoder, self.predictor = self.model.encoder, self.model.predictor
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=False, fused=False)
        side = config.image_size
        self.images = torch.randint(0, 256, (512, 3, side, side), dtype=torch.uint8)

    def take(self, x, mask):
        """Tokens of x [B, N, D] at mask [B, K]."""
        return x.gather(1, mask[:, :, None].expand(-1, -1, x.shape[-1]))

    def encode(self, images, mask):
        """Context tokens, the patches embedded before they are dropped."""
        x = self.encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.encoder.pos_embed
        x = self.take(x, mask)
        for block in self.encoder.blocks:
            x = block(x)
        return self.encoder.norm(x)

    def predict(self, x, asked):
        """Predictor blocks over whole sequences; the places read are the last `asked`."""
        for block in self.predictor.predictor_blocks:
            x = block(x)
        return self.predictor.predictor_proj(self.predictor.predictor_norm(x)[:, -asked:])

    def update(self, loss):
        """Backward, optimizer, EMA."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
                ours.mul_(0.996).add_(theirs * 0.004)
        loss.item()

    def run(self, steps, step):
        """Time `step` (-> the two lengths of its masks) and print JSON."""
        speeds, rows = [], []
        for number in range(steps):
            begin = time.monotonic()
            rows.append(step(number))
            speeds.append(self.config.batch / (time.monotonic() - begin))
        half = sorted(speeds[steps // 3 :])
        memory = common.memory_gib(torch.device("cpu"))
        print(json.dumps(dict(speed=half[len(half) // 2], memory=memory, masks=rows)))


def plain_flexpredict(config, steps):
    """The straightforward step of flexpredict.py, masks image by image."""
    plain = PlainStep(flexpredict, config)
    predictor = plain.predictor

    def step(number):
        batch = flexpredict.normalize(plain.images[torch.randint(512, (config.batch,))])
        (masks_context,), masks_target = reference_masks(config, number, config.batch)
        with torch.no_grad():
            h = F.layer_norm(plain.target(batch), (config.width,))
            h = torch.cat([plain.take(h, mask) for mask in masks_target])
        positions = predictor.predictor_pos_embed.repeat(config.batch, 1, 1)
        x = predictor.predictor_embed(plain.encode(batch, masks_context)) + plain.take(positions, masks_context)
        sequences = []
        for mask in masks_target:
            noise = config.sigma * torch.randn(*mask.shape, config.width)
            sequences.append(torch.cat([x, predictor.predictor_embed(noise) + plain.take(positions, mask)], dim=1))
        plain.update(F.smooth_l1_loss(plain.predict(torch.cat(sequences), masks_target.shape[-1]), h))
        return masks_context.shape[-1], masks_target.shape[-1]

    plain.run(steps, step)


def pil_jitter(image, theta):
    """The jitter of one PIL image as torchvision does it: brightness, contrast, saturation, hue."""
    for kind, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), theta[:3], strict=True
    ):
        image = kind(image).enhance(factor)
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(((np.array(hue, dtype=np.int16) + int(255 * theta[3])) % 256).astype(np.uint8))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def plain_iwm(config, steps):
    """The straightforward step of iwm.py: views image by image with PIL, masks cut after a loop over images."""
    plain, c = PlainStep(iwm, config), config
    predictor = plain.predictor

    def tensor(images):
        return iwm.normalize(torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in images]))

    def step(number):
        chosen = plain.images[torch.randint(512, (c.batch,))].permute(0, 2, 3, 1).numpy()
        views = iwm.draw_views(c.batch, c, torch.Generator().manual_seed(number))
        source, target = [], []
        for i, pixels in enumerate(chosen):
            image = Image.fromarray(pixels)
            target.append(pil_jitter(image, views["target"][i].tolist()))
            x = pil_jitter(image, views["source"][i].tolist())
            grey, blurred, inverted = views["flags"][i].tolist()
            x = x.convert("L").convert("RGB") if grey else x
            x = x.filter(ImageFilter.GaussianBlur(views["sigma"][i].item())) if blurred else x
            source.append(ImageOps.solarize(x) if inverted else x)
        x, y = tensor(source), tensor(target)
        action = iwm.make_action(views["source"], views["target"], views["flags"])
        hidden = iwm.hidden_patches(c, number)
        lists = [[row.nonzero()[:, 0] for row in part] for part in (~hidden, hidden)]
        lengths = [min(map(len, rows)) for rows in lists]
        keep, mask = (torch.stack([r[:n] for r in rows]) for rows, n in zip(lists, lengths, strict=True))
        with torch.no_grad():
            h = plain.take(F.layer_norm(plain.target(y), (c.width,)), mask)
        positions = predictor.predictor_pos_embed.repeat(c.batch, 1, 1)
        context = predictor.predictor_embed(plain.encode(x, keep)) + plain.take(positions, keep)
        queries = predictor.mask_token + plain.take(positions, mask)
        queries = predictor.cond(torch.cat([queries, action[:, None].expand(-1, queries.shape[1], -1)], dim=2))
        plain.update(F.mse_loss(plain.predict(torch.cat([context, queries], dim=1), mask.shape[1]), h))
        return lengths

    plain.run(steps, step)


def bench_jitter(size, count=96, seconds=1.5):
    """Images/s of the jitter alone on one thread: batched as iwm.py does it, and image by image with PIL."""
    torch.set_num_threads(1)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]
    floats, theta = pixels / 255, iwm.draw_views(count, iwm.Config(), torch.Generator().manual_seed(0), always=True)
    rows = theta["target"].tolist()
    ways = {
        "ours": lambda: iwm.jitter(floats, theta["target"]),
        "PIL": lambda: [pil_jitter(image, row) for image, row in zip(images, rows, strict=True)],
    }
    speeds = {}
    for name, make in [*ways.items()] * 2:
        begin, times = time.process_time(), 0  # of this thread alone, whatever else runs on the machine
        while time.process_time() - begin < seconds:
            make()
            times += 1
        speeds[name] = max(speeds.get(name, 0.0), times * count / (time.process_time() - begin))
    ratio = speeds["ours"] / speeds["PIL"]
    print(f"jitter at {size}: {speeds['ours']:.0f} images/s, with PIL {speeds['PIL']:.0f}, {ratio:.1f} times")


bench.SCRIPTS = {
    "flexpredict": (flexpredict, flexpredict_work, plain_flexpredict, ["--masks", "official", "--min-keep", "3"]),
    "iwm": (iwm, iwm_work, plain_iwm, []),
}
bench.SHAPES = {
    "flexpredict": {"toy": ["--preset", "toy"], "tiny": ["--data", "toy", *bench.TINY.split()]},
    "iwm": {"toy": ["--preset", "toy"], "cifar10-cpu": ["--preset", "cifar10-cpu", "--data", "toy"]},
}

if __name__ == "__main__":
    if "--jitter" in sys.argv:
        for side in (32, 224):
            bench_jitter(side)
    else:
        bench.__file__ = __file__  # its plain steps run in a process of this file
        bench.main()
