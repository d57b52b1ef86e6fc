"""ijepa.py against the reference implementation's numbers (golden/ijepa), and its own promises."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, compare, golden_tensors, groups_of, networks, norms
from reference import reference_masks

import common
import ijepa
from ijepa import Config

OFFICIAL = GOLDEN / "ijepa" / "tiny_ijepa.pth.tar"
golden = functools.partial(golden_tensors, "ijepa")
tiny = functools.partial(networks, ijepa, OFFICIAL)


# ----------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    large = common.sincos_2d(1280, 16, 16)
    tables = {"big_d1280_g16": large[g.big_rows][:, g.big_cols]}
    for width, side in {16: 8, 12: 8, 24: 3, 8: 5}.items():
        tables[f"pos_d{width}_g{side}"] = common.sincos_2d(width, side, side)
    compare(g, atol=1e-12, **tables)


def test_forward_loss_and_gradients():
    g = golden("forward")
    patches = common.patchify(g.imgs_q / 16, 4)
    context = g.masks_enc[0]
    targets = g.masks_pred
    _, model, target = tiny()

    def forward():
        encoded = model.encoder(patches, keep=context)
        predictions = model.predictor(encoded, context, targets)
        tokens = target(patches)
        return encoded, predictions, tokens, ijepa.jepa_loss(predictions, tokens, targets)

    encoded, predictions, tokens, loss = forward()
    wanted = F.layer_norm(common.gather_tokens(tokens, targets), (12,))
    compare(g, atol=2e-6, rtol=1e-5, context_tokens=encoded, targets=wanted, pred_out=predictions)
    compare(g, rtol=1e-6, loss=loss, loss_mse=F.mse_loss(predictions, wanted))
    loss.backward()
    for name, part in {"enc": model.encoder, "pred": model.predictor}.items():
        found = norms(part, g[f"grad_names_{name}"], gradients=True)
        compare(g, rtol=1e-4, atol=1e-9, **{f"grad_norms_{name}": found})
    with torch.autocast("cpu", torch.bfloat16):
        encoded, predictions, tokens, loss = forward()
    types = [str(x.dtype) for x in (encoded, predictions, tokens, tokens, tokens, loss)]
    assert types == g.dtypes_bf16_autocast
    compare(g, rtol=1e-2, loss_bf16_autocast=loss)


RATES = "lr_start lr lr_final weight_decay weight_decay_final momentum".split()


def schedule_config(numbers):
    """Return (Config, steps) of golden schedules. The run may end before them."""
    ipe, epochs, warmup, scale, *rates, _ = numbers
    steps = int(scale * epochs * ipe)
    fields = dict(zip(RATES, rates, strict=True))
    return Config(warmup=warmup * ipe / steps, **fields), steps


def test_schedules_to_the_last_step():
    g = golden("schedules")
    for name in ("in1k_h14", "ipe125", "short"):
        numbers = g[f"{name}_config"].tolist()
        config, steps = schedule_config(numbers)
        for i, call in enumerate(g[f"{name}_call"].tolist()):
            lr, wd, _ = ijepa.schedules(config, call - 1, steps)
            # the last number is the final momentum, in the script always 1
            ema = common.linear_schedule(call - 1, steps, config.momentum, numbers[-1])
            compare(g, f"{name}_", at=i, atol=1e-12, lr=lr, wd=wd, ema=ema)
    # a warm-up of three whole epochs is not a step short: 3 / 44 * 27500 is 1874.9999999999998
    config = Config(warmup=3 / 44, lr=1.0)
    assert ijepa.schedules(config, 1874, 27500)[0] == 1.0


def test_parameter_groups():
    g = golden("param_groups")
    _, model, _ = tiny()
    optimizer = ijepa.make_optimizer(model)
    compare(g, betas=optimizer.defaults["betas"], eps=optimizer.defaults["eps"])
    config = Config(weight_decay=0.04, weight_decay_final=0.4)
    common.set_rates(optimizer, *ijepa.schedules(config, 0, 200)[:2])
    compare(g, atol=1e-12, wd_after_first_step=[x["weight_decay"] for x in optimizer.param_groups])
    names = np.array(g.names)
    for number, found in enumerate(groups_of(optimizer, model)):
        assert found == set(names[(g.group == number) & g.requires_grad])


def train_steps(script, g, config, steps, model, target, compute_loss):
    """Train as a script does, by golden schedules. Return the losses, compute_loss(step)."""
    optimizer = script.make_optimizer(model)
    ema = common.EMA(target, model.encoder)
    losses = []
    for step in range(len(g.lr)):
        lr, wd, m = script.schedules(config, step, steps)
        compare(g, at=step, atol=1e-12, lr=lr, wd=wd, m=m)
        common.set_rates(optimizer, lr, wd)
        loss = compute_loss(step)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(m, torch.ones(()))
    return losses


def test_five_training_steps():
    """Loss, gradients, schedules, AdamW and EMA together, against five reference steps."""
    g = golden("train_trace")
    model = tiny()[1].double()
    target = copy.deepcopy(model.encoder)

    def compute_loss(step):
        patches = common.patchify(g.imgs_q[step].double() / 16, 4)
        targets = g[f"masks_pred_{step}"]
        predictions = model(patches, g[f"masks_enc_{step}"][0], targets)
        return ijepa.jepa_loss(predictions, target(patches), targets)

    schedule = schedule_config(g.hyper.tolist())
    losses = train_steps(ijepa, g, *schedule, model, target, compute_loss)
    compare(g, rtol=1e-9, loss=losses)
    found = {
        "final_encoder_qkv0": model.encoder.blocks[0].attn.qkv.weight,
        "final_target_norm_weight": target.norm.weight,
        "final_mask_token": model.predictor.mask_token,
    }
    parts = {"encoder": model.encoder, "predictor": model.predictor, "target": target}
    for name, module in parts.items():
        found[f"norms_{name}"] = norms(module, g[f"names_{name}"])
    compare(g, rtol=1e-9, atol=1e-10, **found)


def test_initialisation():
    g = golden("init")
    sizes = {"image_size": 64, "patch": 8, "width": 192, "depth": 12, "heads": 3}
    config = Config(**sizes, predictor_width=96, predictor_depth=4, init_std=0.02, patch_std=0.02)
    model, target = ijepa.build(config)
    for part in ("encoder", "predictor"):
        state = model.get_submodule(part).state_dict()
        assert list(state) == g[f"{part}_names"]
        for i, (name, weight) in enumerate(state.items()):
            assert "x".join(map(str, weight.shape)) == g[f"{part}_shape"][i]
            std, mean = torch.std_mean(weight)
            if weight.dim() == 1 or "pos_embed" in name:
                compare(g, f"{part}_", at=i, atol=1e-6, std=std, mean=mean)
            elif weight.numel() > 5000:
                # the reference has rare weights of -2, which widen its std
                close(std, g[f"{part}_std"][i].clamp(max=0.02), rtol=0.05)
    close(target.patch_embed.proj.weight, model.encoder.patch_embed.proj.weight)


# ------------------------------------------------------------------------------------------ masks


def mask_config(name):
    """Return the Config of golden masks, and how many times they are drawn."""
    numbers = golden("masks")[f"{name}_config"].tolist()
    size, patch, *_, targets, keep, _, batch, calls, _ = map(int, numbers)
    config = Config(
        image_size=size,
        patch=patch,
        context_scale=numbers[2:4],
        target_scale=numbers[4:6],
        target_aspect=numbers[6:8],
        targets=targets,
        min_context=keep + 1,
        batch=batch,
        micro=batch,
        released=True,
    )
    return config, calls


def test_masks():
    """Block sizes are the golden ones. So are the masks of tests/reference.py, which draws image by
    image in the official order; the batched sampler has their statistics, see below."""
    g = golden("masks")
    for name in ("h14", "b16", "h16_448", "grid8", "relax"):
        c, calls = mask_config(name)
        grid = c.image_size // c.patch
        sizes = [sum(ijepa.block_sizes(c, step), ()) for step in range(100)]
        of_u = []
        for u in np.linspace(0, 1, 101):
            target = ijepa.block_size(u, grid, c.target_scale, c.target_aspect, grid - 1)
            of_u.append(target + ijepa.block_size(u, grid, c.context_scale, (1, 1), grid - 1))
        found = {"sizes": sizes, "size_of_u": of_u}
        torch.manual_seed(3000)
        for call in range(calls):
            found[f"enc_{call}"], found[f"pred_{call}"] = reference_masks(c, call, c.batch)
        compare(g, f"{name}_", **found)


@pytest.mark.parametrize("name", ["h14", "b16", "h16_448", "grid8"])
def test_batched_sampler_has_the_reference_statistics(name):
    """In none of these a target is relaxed, so the samplers differ in the order of draws only."""
    g = golden("masks")
    stats = g[f"{name}_stats"]
    config, _ = mask_config(name)
    grid = config.image_size // config.patch

    def draw(batch, count):
        """Return the contexts and the targets of so many micro-batches."""
        c = replace(config, batch=batch, micro=batch)
        return zip(*(ijepa.sample_masks(c, number) for number in range(count)), strict=True)

    def coverage(masks):
        """Return the share of images in whose masks [B, K] each patch is: their sum is K."""
        patches = torch.cat([mask.flatten() for mask in masks])
        return patches.bincount(minlength=grid**2) / sum(map(len, masks))

    contexts, targets = draw(1, 1500)
    lengths = [blocks.shape[2] for blocks in targets]
    close([np.mean(lengths), np.std(lengths)], stats[1:3], rtol=1e-9)
    union = np.mean([len(blocks.unique()) for blocks in targets])
    close([union, coverage(contexts).sum()], stats[[7, 3]], rtol=0.05)
    for key, masks in {"enc": contexts, "pred": [blocks[0] for blocks in targets]}.items():
        theirs = g[f"{name}_cov_{key}"]
        ours = coverage(masks)
        share = (ours + theirs) / 2
        sigma = (share * (1 - share) / 750).sqrt()
        assert ((ours - theirs).abs() <= 5 * sigma + 0.005).all()
    contexts, _ = draw(*stats[8:10].int().tolist())
    close(coverage(contexts).sum(), stats[10], rtol=0.1)
    tolerance = 0.2 if name == "h16_448" else 0.1
    compare(g, f"{name}_", atol=tolerance, cov_enc_batch=coverage(contexts))


def test_masks_of_small_presets():
    """No target in the context; all patches are seen, since blocks reach the border; contexts are
    long enough, and cut at random."""
    config = Config(image_size=32, patch=4, min_context=8, batch=3000, micro=3000)
    context, targets = ijepa.sample_masks(config, 5)  # of large blocks: some are drawn again
    hidden = F.one_hot(targets, 64).amax((0, 2))  # [B, 64]
    assert context.shape[1] >= 8 and not hidden.gather(1, context).any()
    share = context.flatten().bincount(minlength=64) / context.numel()
    assert share.min() > 0.2 / 64, "some patches are hardly ever context"
    assert abs(share[:32].sum() - 0.5) < 0.02, "the cut favours the top or the bottom"
    assert not torch.equal(ijepa.sample_masks(replace(config, seed=1), 5)[1], targets)


# ------------------------------------------------------------------------------------------ crops


def resized(image, box):
    """Return a box of an image, 16 x 16, as a network sees it."""
    split = common.in_memory(image[None], [0], ["any"], "train")
    (pixels,) = split.read(0, lambda width, height: [box], [16])
    return common.normalize(pixels)


def test_crops():
    """The reference's draws; and its pixels, though it crops before it resizes."""
    g = golden("crops")
    for case in range(4):
        width, height, _, *scale = g[f"case{case}_config"].tolist()
        random = torch.Generator().manual_seed(6000 + case)
        draws = [common.random_crop(int(width), int(height), scale, random) for _ in range(40)]
        close(draws, g[f"case{case}"])
    image = g.image.numpy()
    for box, expected in zip(g.transformed_params.tolist(), g.transformed, strict=True):
        top, left, height, width = box
        crop = image[top : top + height, left : left + width]
        assert (resized(crop, (0, 0, height, width)) - expected).abs().mean() < 1e-5
        # in the whole image it sees a little beyond the crop
        assert (resized(image, box) - expected).abs().mean() < 0.02


# ------------------------------------------------------------------------------------- evaluation


def test_knn():
    g = golden("eval")
    for k in (5, 20):
        scores = common.knn(g.knn_train.float(), g.knn_train_y, g.knn_test.float(), k)
        top1 = common.top1(scores, g.knn_test_y)
        found = {f"scores_k{k}": scores, f"pred_k{k}": scores.argmax(1), f"top1_k{k}": top1}
        compare(g, "knn_", rtol=1e-5, **found)


def test_lars():
    g = golden("eval")
    lr, momentum, decay, trust = g.lars_hyper.tolist()
    w = torch.nn.Parameter(g.lars_w0)
    b = torch.nn.Parameter(g.lars_b0)
    group = {"params": [w, b], "lr": lr, "weight_decay": decay}
    optimizer = ijepa.LARS([group], momentum, trust)
    for step in range(3):
        w.grad = g.lars_gw[step]
        b.grad = g.lars_gb[step]
        optimizer.step()
        compare(g, "lars_", at=step, rtol=1e-10, w=w, b=b)


def test_one_percent_takes_at_least_one_of_each_class():
    labels = torch.tensor([0] * 5 + [1] * 300 + [2] * 95)
    few = ijepa.one_percent(common.Split([""] * 400, [""] * 400, labels, list("abc")))
    assert few.labels.bincount().tolist() == [1, 3, 1]


# ---------------------------------------------------------------------------------------- weights


def test_readouts_of_the_official_checkpoint():
    """They are pooled after the final norm, without another norm as in training."""
    g = golden("forward")
    images = g.imgs_q / 16
    for name in ("encoder", "target"):
        vit = ijepa.load_encoder(OFFICIAL, encoder=name, heads=2)
        tokens = vit(images)
        normed_again = F.layer_norm(tokens, (12,)).mean(1)
        compare(g, f"{name}_", atol=1e-5, tokens=tokens, layernormed_pooled=normed_again)
        features = ijepa.encode(vit, images)  # [B, 4, D]
        compare(g, f"{name}_", atol=1e-5, pooled=features[:, -1], concat4=features.flatten(1))


def test_other_layouts_and_sizes(capsys):
    """The Hub's, bare and wrapped state dicts; positions are interpolated, which is said."""
    g = golden_tensors("hub/ijepa", "expected")
    vit = ijepa.load_encoder(GOLDEN / "hub/ijepa/model.safetensors", heads=2)
    compare(g, atol=1e-5, tokens=vit(g.images))
    g = golden("forward")
    state = common.load_checkpoint(OFFICIAL)["target_encoder"]
    wrapped = {f"module._orig_mod.module.{name}": value for name, value in state.items()}
    for layout in (state, wrapped, {"encoder": state}):
        torch.save(layout, "layout.pt")
        vit = ijepa.load_encoder("layout.pt", heads=2)
        compare(g, atol=1e-5, target_tokens=vit(g.imgs_q / 16))
    vit = ijepa.load_encoder(OFFICIAL, image_size=48, heads=2)
    assert "interpolated from 64 to 144" in capsys.readouterr().out
    assert vit(torch.zeros(1, 3, 48, 40)).shape == (1, 120, 12)
