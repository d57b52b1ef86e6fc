"""The straightforward training step of each script, which tests/bench.py compares with: whatever the script does
differently to be faster, here the obvious way. And the multiply-adds of a step, which are the same for both.

Explicit softmax attention, one optimizer kernel a tensor, an EMA in a loop over parameters, gathers with indices as
large as what they gather, masks drawn image by image in Python, views made image by image with PIL.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from reference import reference_masks

import dinov2
import flexpredict
import ijepa
import iwm
import msn
import vjepa


def explicit_attention(q, k, v):
    """Softmax attention written out: the scores of all pairs are held in memory."""
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float().softmax(dim=-1)
    return scores.to(v.dtype) @ v


def block_work(tokens, width, queries=None):
    """Multiply-adds of a forward pass through a transformer block; with queries only so many tokens are computed."""
    q = tokens if queries is None else queries
    return (2 * tokens + 10 * q) * width**2 + 2 * q * tokens * width


class Plain:
    """What the plain steps share: networks, optimizer, and the obvious way to gather, encode and update."""

    def __init__(self, module, config, student=lambda model: model.encoder):
        torch.manual_seed(0)
        F.scaled_dot_product_attention = explicit_attention
        self.model, self.target = module.build(config)
        self.averaged = student(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False, fused=False)

    def take(self, x, mask):
        """Tokens of x [B, N, D] at mask [B, K]."""
        return x.gather(1, mask[:, :, None].expand(-1, -1, x.shape[-1]))

    def encode(self, images, mask):
        """Context tokens: all patches are embedded, then most of them dropped."""
        encoder = self.model.encoder
        x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2) + encoder.pos_embed
        x = self.take(x, mask)
        for block in encoder.blocks:
            x = block(x)
        return encoder.norm(x)

    def predict(self, x, asked):
        """Predictor blocks on whole sequences, of which the last `asked` places are read."""
        predictor = self.model.predictor
        for block in predictor.predictor_blocks:
            x = block(x)
        return predictor.predictor_proj(predictor.predictor_norm(x)[:, -asked:])

    def update(self, loss, clip=()):
        """Backward, clipping of the modules `clip` to norm 3, optimizer, EMA."""
        loss.backward()
        for part in clip:
            torch.nn.utils.clip_grad_norm_(part.parameters(), 3.0, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(self.target.parameters(), self.averaged.parameters(), strict=True):
                ours.mul_(0.996).add_(theirs * 0.004)
        loss.item()


def random_pixels(config, count=512):
    """uint8 [count, 3, S, S]."""
    return torch.randint(0, 256, (max(count, config.batch), 3, config.image_size, config.image_size), dtype=torch.uint8)


def pil_images(config, count=512):
    """The same as PIL images."""
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in random_pixels(config, count)]


def to_tensor(images):
    """PIL images -> normalised [B, 3, S, S]."""
    return ijepa.normalize(torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in images]))


def pil_jitter(image, factors, order=range(4)):
    """Brightness, contrast, saturation by a factor each, and a shift of hue in turns, in this order, as torchvision."""
    for operation in order:
        if operation < 3:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[operation]
            image = kind(image).enhance(factors[operation])
        else:
            hue, saturation, value = image.convert("HSV").split()
            hue = (np.array(hue, dtype=np.int16) + int(255 * factors[3])) % 256
            image = Image.merge("HSV", (Image.fromarray(hue.astype(np.uint8)), saturation, value)).convert("RGB")
    return image


def pil_view(image, config, size, scale, jitter, random):
    """One view of an image, as the usual pipeline makes it: crop, flip, jitter, grey, blur."""
    c = config
    top, left, h, w = ijepa.random_crop(*image.size, scale)
    image = image.resize((size, size), Image.BILINEAR, box=(left, top, left + w, top + h))
    if c.flip and random.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    if random.random() < c.jitter_share:
        factors = np.array([1, 1, 1, 0]) + np.array(jitter) * random.uniform(-1, 1, 4)
        image = pil_jitter(image, factors, random.permutation(4))
    if random.random() < c.grey:
        image = image.convert("L").convert("RGB")
    if random.random() < np.mean(c.blur):
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*c.blur_sigma)))
    return image


# ------------------------------------------------------------------------------------------- I-JEPA, FlexPredict, IWM


def ijepa_work(config, context, target):
    """FLOPs an image: target encoder forward; what is trained forward and backward (twice that)."""
    c, pixels = config, 3 * config.patch**2
    n, p = (c.image_size // c.patch) ** 2, c.predictor_width
    encoder = context * pixels * c.width + c.depth * block_work(context, c.width)
    predictor = context * c.width * p + c.targets * (
        (c.predictor_depth - 1) * block_work(context + target, p)
        + block_work(context + target, p, target)
        + target * c.width * p
    )
    return 2 * (3 * (encoder + predictor) + n * pixels * c.width + c.depth * block_work(n, c.width))


def flexpredict_work(config, context, target):
    """FLOPs an image: I-JEPA's, and the noise through the predictor's first layer, forward and for its weight."""
    noise = config.targets * target * config.width * config.predictor_width
    return ijepa_work(config, context, target) + 2 * 2 * noise * (config.mode != "ijepa")


def plain_ijepa(config, module=ijepa):
    """The step of ijepa.py, or of flexpredict.py: masks of the released sampler."""
    plain, pixels = Plain(module, config), random_pixels(config)
    predictor = plain.model.predictor

    def step(number):
        batch = ijepa.normalize(pixels[torch.randint(len(pixels), (config.batch,))])
        (masks_context,), masks_target = reference_masks(config, number, config.batch)
        with torch.no_grad():
            h = F.layer_norm(plain.target(batch), (config.width,))
            h = torch.cat([plain.take(h, mask) for mask in masks_target])
        positions = predictor.predictor_pos_embed.repeat(config.batch, 1, 1)
        x = predictor.predictor_embed(plain.encode(batch, masks_context)) + plain.take(positions, masks_context)
        sequences = []
        for mask in masks_target:
            if module is ijepa:
                queries = predictor.mask_token
            else:
                queries = predictor.predictor_embed(config.sigma * torch.randn(*mask.shape, config.width))
            sequences.append(torch.cat([x, queries + plain.take(positions, mask)], dim=1))
        plain.update(F.smooth_l1_loss(plain.predict(torch.cat(sequences), masks_target.shape[-1]), h))
        return masks_context.shape[-1], masks_target.shape[-1]

    return step


def plain_flexpredict(config):
    """The step of flexpredict.py."""
    return plain_ijepa(config, flexpredict)


def iwm_work(config, visible, hidden):
    """FLOPs an image: target encoder forward; source encoder and predictor forward and backward."""
    c, pixels = config, 3 * config.patch**2
    n, p = (c.image_size // c.patch) ** 2, c.predictor_width
    encoder = visible * pixels * c.width + c.depth * block_work(visible, c.width)
    predictor = visible * c.width * p + hidden * (3 * p + iwm.ACTION) * p * (c.conditioning == "feature")
    predictor += (c.predictor_depth - 1) * block_work(visible + hidden, p) + hidden * c.width * p
    predictor += block_work(visible + hidden, p, hidden)
    return 2 * (3 * (encoder + predictor) + n * pixels * c.width + c.depth * block_work(n, c.width))


def plain_iwm(config):
    """The step of iwm.py: views with PIL, masks cut in a loop over images."""
    plain, c, images = Plain(iwm, config), config, pil_images(config)
    predictor = plain.model.predictor

    def step(number):
        views = iwm.draw_views(c.batch, c, torch.Generator().manual_seed(number))
        source, target = [], []
        for i, k in enumerate(torch.randint(len(images), (c.batch,)).tolist()):
            target.append(pil_jitter(images[k], views["target"][i].tolist()))
            x = pil_jitter(images[k], views["source"][i].tolist())
            grey, blurred, inverted = views["flags"][i].tolist()
            x = x.convert("L").convert("RGB") if grey else x
            x = x.filter(ImageFilter.GaussianBlur(views["sigma"][i].item())) if blurred else x
            source.append(ImageOps.solarize(x) if inverted else x)
        x, y = to_tensor(source), to_tensor(target)
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

    return step


# ----------------------------------------------------------------------------------------------------------- MSN, PMSN


def msn_work(config):
    """FLOPs an image: target network forward; random anchors' kept patches and focal views trained."""
    c, pixels = config, 3 * config.patch**2
    patches = (c.image_size // c.patch) ** 2
    focal = (c.focal_size // c.patch) ** 2

    def view(tokens):
        head = c.width * c.head_hidden + c.head_hidden**2 + c.head_hidden * c.embedding
        return tokens * pixels * c.width + c.depth * block_work(tokens + 1, c.width) + head

    anchors = view(msn.kept_patches(patches, c.drop)) + c.focal_views * view(focal)
    return 2 * (3 * anchors + view(patches))


def msn_views(config, images, random):
    """All views of some PIL images, one by one: a list of normalised [B, 3, s, s], the target view first."""
    c, jitter = config, (0.4, 0.4, 0.4, 0.1)
    shares = SimpleNamespace(flip=True, jitter_share=0.8, grey=0.2, blur=c.blur, blur_sigma=(0.1, 2.0))
    kinds = [(c.image_size, (0.3, 1.0))] * 2 + [(c.focal_size, c.focal_scale)] * c.focal_views
    return [to_tensor([pil_view(x, shares, *kind, jitter, random) for x in images]) for kind in kinds]


def plain_msn(config):
    """The step of msn.py and pmsn.py: the encoder runs one view after the other."""
    plain, c, images = Plain(msn, config, lambda model: model.network), config, pil_images(config)
    model, random = plain.model, np.random.default_rng(0)

    def step(number):
        views = msn_views(c, [images[i] for i in random.integers(0, len(images), c.batch)], random)
        with torch.no_grad():
            h = plain.target(views[0])
        patches = (c.image_size // c.patch) ** 2
        keep = torch.randperm(patches)[: msn.kept_patches(patches, c.drop)].expand(c.batch, -1)
        z = [model.network(x, None if i else keep) for i, x in enumerate(views[1:])]
        q = F.normalize(model.prototypes, dim=1)
        p = torch.cat([(F.normalize(x, dim=1) @ q.T / 0.1).softmax(1) for x in z])
        with torch.no_grad():
            t = (F.normalize(h, dim=1) @ q.T / 0.1).softmax(1) ** 4
            t = (t / t.sum(1, keepdim=True)).repeat(len(z), 1)
        mean = p.mean(0)
        loss = torch.mean(-(t * p.log()).sum(1)) + c.weight * (mean * mean.log()).sum()
        plain.update(loss, clip=[model.network])
        return ()

    return step


# -------------------------------------------------------------------------------------------------------------- DINOv2


def dinov2_work(config):
    """FLOPs an image: the student's crops forward and backward, the teacher's global ones forward, both with heads."""
    c, pixels = config, 3 * config.patch**2

    def crop(size):
        tokens = (size // c.patch) ** 2
        return tokens * pixels * c.width + c.depth * block_work(tokens + 1 + c.registers, c.width)

    def head(hidden, bottleneck, prototypes):
        return c.width * hidden + hidden**2 + hidden * bottleneck + bottleneck * prototypes

    masked = c.mask_probability * np.mean(c.mask_ratio) * (c.image_size // c.patch) ** 2  # patches of a global crop
    patch_head = head(c.ibot_hidden, c.ibot_bottleneck, c.ibot_prototypes)
    teacher = 2 * (crop(c.image_size) + head(c.head_hidden, c.bottleneck, c.prototypes) + masked * patch_head)
    local = c.local_crops * (crop(c.local_size) + head(c.head_hidden, c.bottleneck, c.prototypes))
    return 2 * (3 * (teacher + local) + teacher)


def plain_dinov2(config):
    """The step of dinov2.py: crops one by one, a loss for each pair of crops."""
    plain, c, images = Plain(dinov2, config, lambda model: model), config, pil_images(config)
    student, teacher, random = plain.model, plain.target, np.random.default_rng(0)
    none = torch.zeros(0, dtype=torch.long)

    def step(number):
        chosen = [images[i] for i in random.integers(0, len(images), c.batch)]
        crops = [
            [to_tensor([pil_view(x, c, size, scale, c.jitter, random) for x in chosen]) for _ in range(count)]
            for count, size, scale in dinov2.crop_kinds(c)
        ]
        masks = dinov2.sample_masks(c, number)
        with torch.no_grad():
            outputs = [teacher([g], places=dinov2.masked_tokens(m)[0]) for g, m in zip(crops[0], masks)]
            targets = dinov2.sinkhorn(torch.cat([o[1] for o in outputs]), 0.05).chunk(2)
            patch_targets = dinov2.sinkhorn(torch.cat([o[3] for o in outputs]), 0.05)
            patch_targets = patch_targets.split([len(o[3]) for o in outputs])
        loss, pairs = 0.0, 2 + 2 * c.local_crops
        for i, (crop, mask) in enumerate(zip(crops[0], masks)):
            places, weights = dinov2.masked_tokens(mask)
            tokens, logits, _, patch_logits = student([crop], mask, places)
            loss = loss - (targets[1 - i] * F.log_softmax(logits / 0.1, -1)).sum(-1).mean() / pairs
            ibot = -(patch_targets[i] * F.log_softmax(patch_logits / 0.1, -1)).sum(-1)
            loss = loss + (ibot * weights).sum() / (2 * c.batch) + 0.1 * dinov2.koleo_loss(tokens)
        for crop in crops[1] if c.local_crops else []:
            logits = student([crop], places=none)[1]
            for target in targets:
                loss = loss - (target * F.log_softmax(logits / 0.1, -1)).sum(-1).mean() / pairs
        plain.update(loss, clip=student.modules_to_clip())
        return ()

    return step


# -------------------------------------------------------------------------------------------------------------- V-JEPA


def vjepa_work(config, contexts, targets):
    """FLOPs a clip: target encoder forward; for each kind of mask, encoder and predictor on its tokens, trained."""
    c, pixels, n = config, 3 * config.tubelet * config.patch**2, np.prod(vjepa.grid_of(config))
    trained = 0
    for k, kp in zip(contexts, targets, strict=True):
        trained += k * pixels * c.width + c.depth * block_work(k, c.width) + k * c.width * c.predictor_width
        trained += (c.predictor_depth - 1) * block_work(k + kp, c.predictor_width)
        trained += block_work(k + kp, c.predictor_width, kp) + kp * c.width * c.predictor_width
    return 2 * (3 * trained + n * pixels * c.width + c.depth * block_work(n, c.width))


def video_masks(config, step):
    """[context, targets, ...] like `vjepa.sample_masks` of one group, drawn clip by clip as the reference does."""
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


def plain_vjepa(config):
    """The step of vjepa.py, the toy clips included."""
    plain, c = Plain(vjepa, config), config
    predictor = plain.model.predictor

    def step(number):
        rows = [vjepa.toy_clip("train", number * c.batch + i, c, (0, number, i)) for i in range(c.batch)]
        clips = vjepa.normalize(torch.from_numpy(np.stack(rows))).transpose(1, 2)
        masks, losses = video_masks(c, number), []
        with torch.no_grad():
            h = F.layer_norm(plain.target(clips), (c.width,))
        positions = predictor.predictor_pos_embed.repeat(c.batch, 1, 1)
        for i, (keep, asked) in enumerate(zip(masks[::2], masks[1::2], strict=True)):
            x = predictor.predictor_embed(plain.encode(clips, keep)) + plain.take(positions, keep)
            x = torch.cat([x, predictor.mask_tokens[i] + plain.take(positions, asked)], dim=1)
            losses.append((plain.predict(x, asked.shape[1]) - plain.take(h, asked)).abs().mean())
        plain.update(torch.stack(losses).mean())
        return [m.shape[1] for m in masks[::2]], [m.shape[1] for m in masks[1::2]]

    return step
