"""ijepa.py against the reference implementation's numbers (golden/ijepa), and its own promises."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, compare, count, golden_tensors, groups_of, norms
from reference import reference_masks

import common
import ijepa
from ijepa import Config

OFFICIAL = GOLDEN / "ijepa" / "tiny_ijepa.pth.tar"
golden = functools.partial(golden_tensors, "ijepa")


def tiny(dtype=torch.float32):
    """Return (model, target) with the weights of the official-layout tiny checkpoint."""
    weights = ijepa.read_weights(OFFICIAL, heads=2)
    model, target = ijepa.build(Config(**weights["fields"]))
    ijepa.load_weights(model, target, weights, OFFICIAL)
    return model.to(dtype), target.to(dtype)


# ----------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    for width, side in {16: 8, 12: 8, 24: 3, 8: 5}.items():
        table = common.sincos_2d(width, side, side)
        compare(g, atol=1e-12, **{f"pos_d{width}_g{side}": table})
    large = common.sincos_2d(1280, 16, 16)[g.big_rows][:, g.big_cols]
    compare(g, atol=1e-12, big_d1280_g16=large)


def test_forward_loss_and_gradients():
    g = golden("forward")
    patches = common.patchify(g.imgs_q / 16, 4)
    context = g.masks_enc[0]
    targets = g.masks_pred
    model, target = tiny()

    def forward():
        tokens = target(patches)
        predictions = model(patches, context, targets)
        return tokens, predictions, ijepa.jepa_loss(predictions, tokens, targets)

    tokens, predictions, loss = forward()
    encoded = model.encoder(patches, keep=context)
    wanted = F.layer_norm(common.gather_tokens(tokens, targets), (12,))
    found = {"context_tokens": encoded, "targets": wanted, "pred_out": predictions}
    compare(g, atol=2e-6, rtol=1e-5, **found)
    compare(g, rtol=1e-6, loss=loss, loss_mse=F.mse_loss(predictions, wanted))
    loss.backward()
    for name, part in {"enc": model.encoder, "pred": model.predictor}.items():
        found = norms(part, g[f"grad_names_{name}"], gradients=True)
        compare(g, rtol=1e-4, atol=1e-9, **{f"grad_norms_{name}": found})
    with torch.autocast("cpu", torch.bfloat16):
        encoded = model.encoder(patches, keep=context)
        tokens, predictions, loss = forward()
    types = [str(x.dtype) for x in (encoded, predictions, tokens, tokens, tokens, loss)]
    assert types == g.dtypes_bf16_autocast
    compare(g, rtol=1e-2, loss_bf16_autocast=loss)


@pytest.mark.parametrize("name", ["encoder", "target"])
def test_readouts_of_the_official_checkpoint(name):
    """They are pooled after the final norm, without another norm as in training."""
    g = golden("forward")
    vit = ijepa.load_encoder(OFFICIAL, encoder=name, heads=2)
    images = g.imgs_q / 16
    features = ijepa.encode(vit, images)  # [B, 4, D]
    last = features[:, -1]
    found = {"tokens": vit(images), "pooled": last, "concat4": features.flatten(1)}
    compare(g, f"{name}_", atol=1e-5, **found)
    assert (last - g[f"{name}_layernormed_pooled"]).abs().max() > 0.01


def schedule_config(numbers):
    """Return (Config, steps) of golden schedules. The run may end before them."""
    ipe, epochs, warmup, scale, start_lr, lr, final_lr, wd, final_wd, momentum, _ = numbers
    steps = int(scale * epochs * ipe)
    config = Config(warmup=int(warmup * ipe) / steps, lr=lr, lr_start=start_lr, lr_final=final_lr)
    decays = {"weight_decay": wd, "weight_decay_final": final_wd}
    return replace(config, **decays, momentum=momentum), steps


def test_schedules_to_the_last_step():
    g = golden("schedules")
    for name in ("in1k_h14", "ipe125", "short"):
        config, steps = schedule_config(g[f"{name}_config"].tolist())
        final = g[f"{name}_config"][-1].item()  # ours is always 1
        for i, call in enumerate(g[f"{name}_call"].tolist()):
            lr, wd, _ = ijepa.schedules(config, call - 1, steps)
            ema = common.linear_schedule(call - 1, steps, config.momentum, final)
            compare(g, f"{name}_", at=i, atol=1e-12, lr=lr, wd=wd, ema=ema)


def test_warmup_of_whole_epochs_is_not_a_step_short():
    config = Config(warmup=3 / 44, lr=1.0, lr_start=0.0)
    for ipe in range(600, 660):
        schedules = [ijepa.schedules(config, 3 * ipe - k, 44 * ipe) for k in (2, 1)]
        assert schedules[0][0] < schedules[1][0] == 1.0


def test_parameter_groups():
    g = golden("param_groups")
    model, _ = tiny()
    optimizer = ijepa.make_optimizer(model)
    compare(g, betas=optimizer.defaults["betas"], eps=optimizer.defaults["eps"])
    config = Config(weight_decay=0.04, weight_decay_final=0.4)
    common.set_rates(optimizer, *ijepa.schedules(config, 0, 200)[:2])
    compare(g, atol=1e-12, wd_after_first_step=[x["weight_decay"] for x in optimizer.param_groups])
    names = np.array(g.names)
    for number, found in enumerate(groups_of(optimizer, model)):
        assert found == set(names[(g.group == number) & g.requires_grad])


def test_five_training_steps():
    """Masks, loss, gradients, schedules, AdamW and EMA together, against five reference steps."""
    g = golden("train_trace")
    model, _ = tiny(torch.float64)
    target = copy.deepcopy(model.encoder)
    config, steps = schedule_config(g.hyper.tolist())
    optimizer = ijepa.make_optimizer(model)
    ema = common.EMA(target, model.encoder)
    for step in range(5):
        lr, wd, m = ijepa.schedules(config, step, steps)
        compare(g, at=step, atol=1e-12, lr=lr, wd=wd, m=m)
        common.set_rates(optimizer, lr, wd)
        patches = common.patchify(g.imgs_q[step].double() / 16, 4)
        context = g[f"masks_enc_{step}"][0]
        targets = g[f"masks_pred_{step}"]
        tokens = target(patches)
        loss = ijepa.jepa_loss(model(patches, context, targets), tokens, targets)
        compare(g, at=step, rtol=1e-9, loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(m, torch.ones(()))
    found = {
        "final_encoder_qkv0": model.encoder.blocks[0].attn.qkv.weight,
        "final_target_norm_weight": target.norm.weight,
        "final_mask_token": model.predictor.mask_token,
    }
    parts = {"encoder": model.encoder, "predictor": model.predictor, "target": target}
    for name, module in parts.items():
        state = module.state_dict()
        assert set(g[f"names_{name}"]) == set(state)
        found[f"norms_{name}"] = norms(module, g[f"names_{name}"])
    compare(g, rtol=1e-9, atol=1e-10, **found)


def test_initialisation():
    g = golden("init")
    sizes = {"image_size": 64, "patch": 8, "width": 192, "depth": 12, "heads": 3}
    config = Config(**sizes, predictor_width=96, predictor_depth=4, init_std=0.02, patch_std=0.02)
    model, target = ijepa.build(config)
    for part in ("encoder", "predictor"):
        state = getattr(model, part).state_dict()
        assert set(g[f"{part}_names"]) == set(state)
        columns = [g[f"{part}_{key}"] for key in ("names", "shape", "std", "mean")]
        for name, shape, std, mean in zip(*columns, strict=True):
            ours = state[name]
            assert "x".join(map(str, ours.shape)) == shape
            if ours.numel() > 5000 and "pos_embed" not in name:
                # the reference has rare weights of -2, which widen its std
                close(ours.std(), min(std, 0.02), rtol=0.05)
            elif ours.dim() == 1 or "pos_embed" in name:
                close([ours.std(), ours.mean()], [std, mean], atol=1e-6)
    close(target.patch_embed.proj.weight, model.encoder.patch_embed.proj.weight)


SIZES = {  # encoder parameters, position tables counted
    "vit_b16_in1k": 85_797_120,
    "vit_l16_in1k": 303_299_584,
    "vit_h14_in1k": 630_762_240,
    "vit_h16_448_in1k": 631_668_480,
    "vit_h14_in22k": 630_762_240,
    "vit_g16_in22k": 1_011_368_576,
}


def test_paper_presets_have_the_papers_sizes():
    for name, expected in SIZES.items():
        with torch.device("meta"):
            model = ijepa.IJEPA(Config(**ijepa.PRESETS[name]))
        assert count(model.encoder) == expected, name


# ------------------------------------------------------------------------------------------ masks

MASK_CONFIGS = ["h14", "b16", "h16_448", "grid8", "relax"]


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


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_masks(name):
    """Sizes and rectangles are the golden ones. So are the masks of tests/reference.py, which draws
    image by image in the official order; the batched sampler is compared with it below."""
    g = golden("masks")
    config, calls = mask_config(name)
    grid = config.image_size // config.patch
    sizes = [sum(ijepa.block_sizes(config, step), ()) for step in range(100)]
    of_u = []
    for u in np.linspace(0, 1, 101):
        target = ijepa.block_size(u, grid, config.target_scale, config.target_aspect, grid - 1)
        of_u.append(target + ijepa.block_size(u, grid, config.context_scale, (1, 1), grid - 1))
    compare(g, f"{name}_", sizes=sizes, size_of_u=of_u)
    torch.manual_seed(3000)
    for call in range(calls):
        contexts, targets = reference_masks(config, call, config.batch)
        compare(g, f"{name}_", **{f"enc_{call}": contexts, f"pred_{call}": targets})
        corner = targets[..., 0]  # the top left one
        size, _ = ijepa.block_sizes(config, call)
        blocks = ijepa.rectangles(corner // grid, corner % grid, size, grid)
        assert torch.equal(blocks.nonzero()[:, 2].view(targets.shape), targets)


@pytest.mark.parametrize("name", ["h14", "b16", "h16_448", "grid8"])
def test_batched_sampler_has_the_reference_statistics(name):
    """In none of these a target is relaxed, so the samplers differ in the order of draws only."""
    g = golden("masks")
    stats = g[f"{name}_stats"]
    config, _ = mask_config(name)
    side = config.image_size // config.patch

    def draw(batch, count):
        """Return the contexts and the targets of so many micro-batches."""
        c = replace(config, batch=batch, micro=batch)
        return zip(*(ijepa.sample_masks(c, number) for number in range(count)), strict=True)

    def coverage(blocks, images):
        """Return the share of images in whose blocks each patch is."""
        return torch.cat([block.flatten() for block in blocks]).bincount(minlength=side**2) / images

    contexts, targets = draw(1, 1500)
    asked = [x.shape[-1] for x in targets]
    seen = np.mean([x.shape[-1] for x in contexts])
    united = np.mean([len(x.unique()) for x in targets])
    close([np.mean(asked), np.std(asked)], stats[1:3], rtol=1e-9)
    close([seen, united], stats[[3, 7]], rtol=0.05)
    for key, blocks in (("enc", contexts), ("pred", [x[0] for x in targets])):
        ours = coverage(blocks, 1500)
        theirs = g[f"{name}_cov_{key}"]
        q = (ours + theirs) / 2
        sigma = (q * (1 - q) / 750).sqrt()
        assert ((ours - theirs).abs() <= 5 * sigma + 0.005).all()
        grid = ours.view(side, side)
        assert grid[-1].max() == grid[:, -1].max() == 0
    batch, batches = stats[8:10].int().tolist()
    contexts, _ = draw(batch, batches)
    close(np.mean([x.shape[-1] for x in contexts]), stats[10], rtol=0.1)
    cover = coverage(contexts, batch * batches)
    compare(g, f"{name}_", atol=0.2 if name == "h16_448" else 0.1, cov_enc_batch=cover)


def test_masks_of_small_presets():
    """No target in the context; all patches are seen, since blocks reach the border; contexts are
    long enough, and cut at random."""
    config = Config(image_size=32, patch=4, min_context=8, batch=256, micro=256)
    cover = torch.zeros(64)
    for number in range(20):
        context, targets = ijepa.sample_masks(config, number)
        assert context.shape[1] >= 8
        hidden = F.one_hot(targets, 64).amax((0, 2))  # [B, 64]
        assert not hidden.gather(1, context).any()
        cover += torch.bincount(context.flatten(), minlength=64)
    cover /= cover.sum()
    assert cover.min() > 0.2 / 64, "some patches are hardly ever context"
    assert abs(cover[:32].sum() - 0.5) < 0.02, "the cut favours the top or the bottom"
    assert not torch.equal(ijepa.sample_masks(replace(config, seed=1), 19)[1], targets)


# ------------------------------------------------------------------------------------------ crops


def test_crops():
    """The reference's draws; and its pixels, though it crops before it resizes."""
    g = golden("crops")
    for case in range(4):
        width, height, _, *scale = g[f"case{case}_config"].tolist()
        random = torch.Generator().manual_seed(6000 + case)
        draws = [common.random_crop(int(width), int(height), scale, random) for _ in range(40)]
        close(draws, g[f"case{case}"])
    whole = g.image.numpy()
    for box, expected in zip(g.transformed_params.tolist(), g.transformed, strict=True):
        top, left, height, width = map(int, box)
        cut = whole[top : top + height, left : left + width]
        # resize(box=) sees a little beyond the crop
        cases = (whole, box, 0.02), (cut, (0, 0, height, width), 1e-5)
        for image, part, tolerance in cases:
            split = common.in_memory(image[None], [0], ["any"], "train")
            (pixels,) = split.read(0, lambda *_, part=part: [part], [16])
            found = common.normalize(pixels[None])[0]
            assert (found - expected).abs().mean() < tolerance


# ------------------------------------------------------------------------------------- evaluation


def test_knn():
    g = golden("eval")
    for k in (5, 20):
        scores = common.knn(g.knn_train.float(), g.knn_train_y, g.knn_test.float(), k)
        top1 = common.top1(scores, g.knn_test_y)
        found = {"scores": scores, "pred": scores.argmax(1), "top1": top1}
        found = {f"knn_{name}_k{k}": value for name, value in found.items()}
        compare(g, rtol=1e-5, **found)


def test_lars():
    g = golden("eval")
    lr, momentum, decay, trust = g.lars_hyper.tolist()
    parameters = {name: torch.nn.Parameter(g[f"lars_{name}0"]) for name in ("w", "b")}
    group = {"params": [*parameters.values()], "lr": lr, "weight_decay": decay}
    optimizer = ijepa.LARS([group], momentum, trust)
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = g[f"lars_g{name}"][step]
        optimizer.step()
        compare(g, "lars_", at=step, rtol=1e-10, **parameters)


def test_one_percent_takes_at_least_one_of_each_class():
    labels = torch.tensor([0] * 5 + [1] * 300 + [2] * 95)
    few = ijepa.one_percent(common.Split([""] * 400, [""] * 400, labels, list("abc")))
    assert few.labels.bincount().tolist() == [1, 3, 1]


# ---------------------------------------------------------------------------------------- weights


def test_other_layouts_and_sizes(capsys):
    """The Hub's, bare and wrapped state dicts; positions are interpolated, which is said."""
    g = golden_tensors("hub/ijepa", "expected")
    vit = ijepa.load_encoder(GOLDEN / "hub" / "ijepa" / "model.safetensors", heads=2)
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
