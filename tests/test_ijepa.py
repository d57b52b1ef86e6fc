"""ijepa.py against the reference implementation's numbers (tests/golden/ijepa) and its own promises."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import reference_masks

import common
import ijepa
from ijepa import Config

GOLDEN = Path(__file__).parent / "golden" / "ijepa"
TINY = {"image_size": 32, "patch": 4, "width": 12, "depth": 5, "heads": 2}
TINY.update(predictor_width=8, predictor_depth=2)


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float64):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), tensor(expected), atol=atol, rtol=rtol
    )


def tiny(dtype=torch.float32):
    """Return (model, target) with the weights of the official-layout tiny checkpoint."""
    model, target = ijepa.build(Config(**TINY))
    path = GOLDEN / "tiny_ijepa.pth.tar"
    ijepa.load_weights(model, target, ijepa.read_weights(path, heads=2), path)
    return model.to(dtype), target.to(dtype)


def forward_inputs(dtype):
    """Return (golden file, patches, context [B, K], targets [M, B, Kp]) of the forward pass."""
    g = golden("forward")
    patches = common.patchify(tensor(g["imgs_q"], dtype) / 16, 4)
    return g, patches, tensor(g["masks_enc"], torch.long)[0], tensor(g["masks_pred"], torch.long)


# ----------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    for width, side in ((16, 8), (12, 8), (24, 3), (8, 5)):
        close(common.sincos_2d(width, side, side), g[f"pos_d{width}_g{side}"], atol=1e-12)
    large = common.sincos_2d(1280, 16, 16)[g["big_rows"]][:, g["big_cols"]]
    close(large, g["big_d1280_g16"], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_loss_and_gradients(dtype):
    g, patches, context, targets = forward_inputs(dtype)
    model, target = tiny(dtype)
    tolerance = {"atol": 2e-6, "rtol": 1e-5}
    close(model.encoder(patches, keep=context), g["context_tokens"], **tolerance)
    tokens = target(patches)
    wanted = torch.nn.functional.layer_norm(common.gather_tokens(tokens, targets), (12,))
    close(wanted, g["targets"], **tolerance)
    predictions = model(patches, context, targets)
    close(predictions.detach(), g["pred_out"], **tolerance)
    loss = ijepa.jepa_loss(predictions, tokens.detach(), targets)
    close(loss.detach(), g["loss"], rtol=1e-6)
    mse = torch.nn.functional.mse_loss(predictions, wanted)
    close(mse.detach(), g["loss_mse"], rtol=1e-6)
    loss.backward()
    for part, names in (("encoder", "enc"), ("predictor", "pred")):
        parameters = dict(getattr(model, part).named_parameters())
        norms = [parameters[name].grad.norm() for name in g[f"grad_names_{names}"]]
        close(torch.stack(norms), g[f"grad_norms_{names}"], rtol=1e-4, atol=1e-9)


def test_bf16_autocast_keeps_the_reference_types():
    g, patches, context, targets = forward_inputs(torch.float32)
    model, target = tiny()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        encoded = model.encoder(patches, keep=context)
        tokens = target(patches)
        predictions = model(patches, context, targets)
        loss = ijepa.jepa_loss(predictions, tokens, targets)
    types = [str(x.dtype) for x in (encoded, predictions, tokens, tokens, tokens, loss)]
    assert types == list(g["dtypes_bf16_autocast"])
    close(loss, g["loss_bf16_autocast"], rtol=1e-2)


def test_readouts_are_pooled_after_the_final_norm_only():
    g = golden("forward")
    model, target = tiny()
    images = tensor(g["imgs_q"], torch.float32) / 16
    for name, encoder in (("encoder", model.encoder), ("target", target)):
        features = ijepa.encode(encoder, images)  # [B, 4, D]
        close(encoder(images), g[f"{name}_tokens"], atol=1e-5)
        close(features[:, -1], g[f"{name}_pooled"], atol=1e-5)
        close(features.flatten(1), g[f"{name}_concat4"], atol=1e-5)
        trained = tensor(g[f"{name}_layernormed_pooled"])
        assert (features[:, -1].double() - trained).abs().max() > 0.01


def schedule_config(numbers):
    """Return (Config, steps, last EMA momentum) of golden schedules; the run may end before them."""
    ipe, epochs, warmup, scale, start_lr, lr, final_lr, wd, final_wd, ema0, ema1 = numbers
    steps = int(scale * epochs * ipe)
    config = Config(
        warmup=int(warmup * ipe) / steps,
        lr=lr,
        lr_start=start_lr,
        lr_final=final_lr,
        weight_decay=wd,
        weight_decay_final=final_wd,
        momentum=ema0,
    )
    return config, steps, ema1


def test_schedules_to_the_last_step():
    g = golden("schedules")
    for name in ("in1k_h14", "ipe125", "short"):
        config, steps, ema1 = schedule_config(g[f"{name}_config"])
        calls = [int(k) - 1 for k in g[f"{name}_call"]]
        ours = np.array([ijepa.schedules(config, step, steps) for step in calls])
        if ema1 != 1.0:
            ours[:, 2] = [common.linear_schedule(k, steps, config.momentum, ema1) for k in calls]
        for i, key in enumerate(("lr", "wd", "ema")):
            np.testing.assert_allclose(ours[:, i], g[f"{name}_{key}"], rtol=0, atol=1e-12)


def test_warmup_of_whole_epochs_is_not_a_step_short():
    for ipe in range(600, 660):
        config = Config(warmup=3 / 44, lr=1.0, lr_start=0.0)
        rates = [ijepa.schedules(config, step, 44 * ipe)[0] for step in (3 * ipe - 2, 3 * ipe - 1)]
        assert rates[0] < 1.0 and rates[1] == 1.0


def test_parameter_groups():
    g = golden("param_groups")
    model, _ = tiny()
    names = {p: n for n, p in model.named_parameters()}
    optimizer = ijepa.make_optimizer(model)
    ours = {names[p]: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    trained = zip(g["names"], g["group"], g["requires_grad"], strict=True)
    assert ours == {name: group for name, group, trained in trained if trained}
    assert tuple(g["betas"]) == optimizer.defaults["betas"]
    assert float(g["eps"]) == optimizer.defaults["eps"]
    decay = ijepa.schedules(Config(weight_decay=0.04, weight_decay_final=0.4), 0, 200)[1]
    common.set_rates(optimizer, 0.1, decay)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    np.testing.assert_allclose(decays, g["wd_after_first_step"], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_training_steps(dtype):
    """Masks, loss, gradients, schedules, AdamW and EMA together, against five reference steps."""
    g = golden("train_trace")
    model, _ = tiny(dtype)
    target = copy.deepcopy(model.encoder)
    config, steps, ema1 = schedule_config(g["hyper"])
    optimizer = ijepa.make_optimizer(model)
    ema = common.EMA(target, model.encoder)
    exact = dtype == torch.float64
    for step in range(5):
        lr, decay, _ = ijepa.schedules(config, step, steps)
        momentum = common.linear_schedule(step, steps, config.momentum, ema1)
        rates = lr, decay, momentum
        np.testing.assert_allclose(rates, [g[k][step] for k in ("lr", "wd", "m")], atol=1e-12)
        common.set_rates(optimizer, *rates[:2])
        patches = common.patchify(tensor(g["imgs_q"][step], dtype) / 16, 4)
        context = tensor(g[f"masks_enc_{step}"], torch.long)[0]
        targets = tensor(g[f"masks_pred_{step}"], torch.long)
        with torch.no_grad():
            tokens = target(patches)
        loss = ijepa.jepa_loss(model(patches, context, targets), tokens, targets)
        close(loss.detach(), g["loss"][step], rtol=1e-9 if exact else 1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(rates[2], torch.ones(()))
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if exact else {"rtol": 1e-3, "atol": 1e-4}
    parts = {"encoder": model.encoder, "predictor": model.predictor, "target": target}
    for name, module in parts.items():
        state = module.state_dict()
        assert set(g[f"names_{name}"]) == set(state)
        norms = torch.stack([state[n].norm() for n in g[f"names_{name}"]])
        close(norms, g[f"norms_{name}"], **tolerance)
    qkv = model.encoder.blocks[0].attn.qkv.weight.detach()
    close(qkv, g["final_encoder_qkv0"], **tolerance)
    close(target.norm.weight, g["final_target_norm_weight"], **tolerance)
    close(model.predictor.mask_token.detach(), g["final_mask_token"], **tolerance)


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
                assert abs(ours.std().item() / 0.02 - 1) < 0.05
                # the reference's rare weights of -2
                wide = math.sqrt(0.02**2 + 4 / ours.numel())
                assert min(abs(std / 0.02 - 1), abs(std / wide - 1)) < 0.05
            elif ours.dim() == 1 or "pos_embed" in name:
                found = [ours.std().item(), ours.mean().item()]
                np.testing.assert_allclose(found, [std, mean], atol=1e-6)
    pairs = zip(model.encoder.parameters(), target.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


SIZES = {  # encoder parameters, position tables counted
    "vit_b16_in1k": 85_797_120,
    "vit_l16_in1k": 303_299_584,
    "vit_h14_in1k": 630_762_240,
    "vit_h16_448_in1k": 631_668_480,
    "vit_h14_in22k": 630_762_240,
    "vit_g16_in22k": 1_011_368_576,
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_presets_have_the_papers_sizes(name):
    config, _ = common.parse_config(Config, ijepa.PRESETS, ijepa.DATA_PRESETS, ["--preset", name])
    with torch.device("meta"):
        model = ijepa.IJEPA(config)
    assert sum(p.numel() for p in model.encoder.parameters()) == SIZES[name]
    ijepa.check(config, common.World(0, 16))


# ------------------------------------------------------------------------------------------ masks

MASK_CONFIGS = ["h14", "b16", "h16_448", "grid8", "relax"]


def mask_config(name, **changes):
    numbers = golden("masks")[f"{name}_config"]
    size, patch, e0, e1, p0, p1, a0, a1, contexts, targets, keep, overlap, batch, calls, skip = (
        numbers
    )
    assert contexts == 1 and not overlap
    config = Config(
        image_size=int(size),
        patch=int(patch),
        context_scale=(e0, e1),
        target_scale=(p0, p1),
        target_aspect=(a0, a1),
        targets=int(targets),
        min_context=int(keep) + 1,
        batch=int(batch),
        micro=int(batch),
        released=True,
    )
    return replace(config, **changes), int(calls), int(skip)


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_reference_sampler_gives_the_golden_masks(name):
    """tests/reference.py draws image by image in the official order; the batched sampler is
    compared with it below."""
    g = golden("masks")
    config, calls, skip = mask_config(name)
    torch.manual_seed(3000)
    for call in range(calls):
        contexts, targets = reference_masks(config, skip + call, config.batch)
        np.testing.assert_array_equal(contexts, g[f"{name}_enc_{call}"])
        np.testing.assert_array_equal(targets, g[f"{name}_pred_{call}"])


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_block_sizes(name):
    g = golden("masks")
    config, _, _ = mask_config(name)
    sizes = [sum(ijepa.block_sizes(config, step), ()) for step in range(100)]
    np.testing.assert_array_equal(sizes, g[f"{name}_sizes"])
    grid = config.image_size // config.patch
    for u, expected in zip(np.linspace(0, 1, 101), g[f"{name}_size_of_u"], strict=True):
        target = ijepa.block_size(u, grid, config.target_scale, config.target_aspect, grid - 1)
        context = ijepa.block_size(u, grid, config.context_scale, (1, 1), grid - 1)
        assert target + context == tuple(expected)


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_rectangles_are_the_golden_blocks(name):
    g = golden("masks")
    config, calls, skip = mask_config(name)
    grid = config.image_size // config.patch
    for call in range(calls):
        size, _ = ijepa.block_sizes(config, skip + call)
        expected = tensor(g[f"{name}_pred_{call}"], torch.long)
        first = expected[..., 0]  # the top left corner
        blocks = ijepa.rectangles(first // grid, first % grid, size, grid)
        assert torch.equal(blocks.nonzero()[:, 2].view(expected.shape), expected)


@pytest.mark.parametrize("name", ["h14", "b16", "h16_448", "grid8"])
def test_batched_sampler_has_the_reference_statistics(name):
    """In none of these a target is relaxed, so the samplers differ in the order of draws only."""
    g = golden("masks")
    config, _, _ = mask_config(name, batch=1, micro=1)
    draws, kp_mean, kp_std, k_mean, _, _, _, union_mean, batch, batches, kt_mean, _ = g[
        f"{name}_stats"
    ]
    batch, batches = int(batch), int(batches)
    side = config.image_size // config.patch
    counts = [math.prod(ijepa.block_sizes(config, step)[0]) for step in range(1500)]
    np.testing.assert_allclose([np.mean(counts), np.std(counts)], [kp_mean, kp_std], rtol=1e-9)
    covered = {"pred": torch.zeros(side**2), "enc": torch.zeros(side**2)}
    lengths, unions = [], []
    for step in range(1500):
        context, targets = ijepa.sample_masks(config, step)
        covered["enc"][context[0]] += 1
        covered["pred"][targets[0, 0]] += 1
        lengths.append(context.shape[1])
        unions.append(len(targets.unique()))
    for key, count in covered.items():
        ours = count / 1500
        theirs = tensor(g[f"{name}_cov_{key}"], torch.float32)
        q = (ours + theirs) / 2
        limit = 5 * (2 * q * (1 - q) / min(1500, draws)).sqrt() + 0.005
        assert ((ours - theirs).abs() <= limit).all()
        grid = ours.view(side, side)
        assert grid[-1].max() == 0 and grid[:, -1].max() == 0
    np.testing.assert_allclose([np.mean(lengths), np.mean(unions)], [k_mean, union_mean], rtol=0.05)
    whole = replace(config, batch=batch, micro=batch)
    cut, cover = [], torch.zeros(side**2)
    for step in range(batches):
        context, _ = ijepa.sample_masks(whole, step)
        cut.append(context.shape[1])
        cover += torch.bincount(context.flatten(), minlength=side**2) / batch
    np.testing.assert_allclose(np.mean(cut), kt_mean, rtol=0.1)
    difference = cover / batches - tensor(g[f"{name}_cov_enc_batch"], torch.float32)
    assert difference.abs().max() < (0.2 if name == "h16_448" else 0.1)


def test_masks_of_small_presets():
    """No target in the context, borders reached, contexts cut at random and long enough."""
    config = Config(image_size=32, patch=4, min_context=8, batch=256, micro=256)
    cover = torch.zeros(64)
    for number in range(20):
        context, targets = ijepa.sample_masks(config, number)
        assert context.shape[1] >= 8
        assert (context.diff(dim=-1) > 0).all() and (targets.diff(dim=-1) > 0).all()
        hidden = torch.zeros(256, 64, dtype=torch.bool)
        hidden.scatter_(1, targets.transpose(0, 1).flatten(1), True)
        assert not hidden.gather(1, context).any()
        cover += torch.bincount(context.flatten(), minlength=64)
    cover = (cover / cover.sum()).view(8, 8)
    assert cover.min() > 0.2 / 64, "some patches are hardly ever context"
    assert abs(cover[:4].sum() - 0.5) < 0.02, "the cut favours the top or the bottom"


def test_masks_depend_on_seed_and_number_only():
    config = Config(seed=3)
    first, again = ijepa.sample_masks(config, 7), ijepa.sample_masks(config, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (ijepa.sample_masks(replace(config, seed=4), 7), ijepa.sample_masks(config, 8)):
        assert other[1].shape != first[1].shape or not torch.equal(other[1], first[1])


def test_impossible_masks_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        ijepa.check(Config(targets=30), common.World())
    assert stop.value.code == 2 and "context" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ crops


def test_random_crop_draws_are_the_reference_draws():
    g = golden("crops")
    for case in range(4):
        width, height, _, low, high = g[f"case{case}_config"]
        random = torch.Generator().manual_seed(6000 + case)
        size = int(width), int(height)
        ours = [common.random_crop(*size, (low, high), random) for _ in range(40)]
        np.testing.assert_array_equal(ours, g[f"case{case}"])


def test_train_transform_pixels():
    """Crop, resize and normalise, against the reference's, which crops before it resizes."""
    g = golden("crops")
    split = common.in_memory(g["image"][None], np.zeros(1, int), ["any"], "train")
    for box, expected in zip(g["transformed_params"].tolist(), g["transformed"], strict=True):
        (part,) = split.read(0, lambda width, height, box=box: [box], [16])
        # resize(box=) sees a little beyond the crop
        assert (common.normalize(part[None])[0] - tensor(expected)).abs().mean() < 0.02
        top, left, height, width = map(int, box)
        cut = Image.fromarray(g["image"]).crop((left, top, left + width, top + height))
        cut = torch.from_numpy(np.array(cut.resize((16, 16), Image.BILINEAR))).permute(2, 0, 1)
        close(common.normalize(cut[None])[0], expected, atol=1e-5)


# ------------------------------------------------------------------------------------- evaluation


def test_knn():
    g = golden("eval")
    train, labels = tensor(g["knn_train"]), tensor(g["knn_train_y"], torch.long)
    for k in (5, 20):
        scores = common.knn(train, labels, tensor(g["knn_test"]), k)
        close(scores, g[f"knn_scores_k{k}"], rtol=1e-5)
        np.testing.assert_array_equal(scores.argmax(1), g[f"knn_pred_k{k}"])
        top1 = common.top1(scores, tensor(g["knn_test_y"], torch.long))
        assert top1 == pytest.approx(float(g[f"knn_top1_k{k}"]))


def test_lars():
    g = golden("eval")
    lr, momentum, decay, trust = g["lars_hyper"]
    weight, bias = (
        torch.nn.Parameter(tensor(g["lars_w0"])),
        torch.nn.Parameter(tensor(g["lars_b0"])),
    )
    group = {"params": [weight, bias], "lr": lr, "weight_decay": decay}
    optimizer = ijepa.LARS([group], momentum, trust)
    for step in range(3):
        weight.grad, bias.grad = tensor(g["lars_gw"][step]), tensor(g["lars_gb"][step])
        optimizer.step()
        close(weight.detach(), g["lars_w"][step], rtol=1e-10)
        close(bias.detach(), g["lars_b"][step], rtol=1e-10)


def test_one_percent_takes_at_least_one_of_each_class():
    labels = np.repeat(np.arange(3), [5, 300, 95])
    split = common.in_memory(np.zeros((400, 2, 2, 3), np.uint8), labels, list("abc"), "train")
    few = ijepa.one_percent(split)
    assert torch.bincount(few.labels).tolist() == [1, 3, 1]


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["encoder", "target"])
def test_official_checkpoint(name):
    g = golden("forward")
    vit = ijepa.load_encoder(GOLDEN / "tiny_ijepa.pth.tar", encoder=name, heads=2)
    close(vit(tensor(g["imgs_q"], torch.float32) / 16), g[f"{name}_tokens"], atol=1e-5)


def test_hub_checkpoint():
    folder = GOLDEN.parent / "hub" / "ijepa"
    expected = np.load(folder / "expected.npz")
    vit = ijepa.load_encoder(folder / "model.safetensors", heads=2)
    close(vit(torch.from_numpy(expected["images"])), expected["tokens"], atol=1e-5)


def test_bare_and_wrapped_state_dicts():
    g = golden("forward")
    state = torch.load(GOLDEN / "tiny_ijepa.pth.tar", weights_only=True)["target_encoder"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    torch.save(state, "bare.pt")
    torch.save({f"module._orig_mod.module.{k}": v for k, v in state.items()}, "wrapped.pt")
    torch.save({"encoder": state}, "encoder.pt")
    for name in ("bare.pt", "wrapped.pt", "encoder.pt"):
        vit = ijepa.load_encoder(name, heads=2)
        close(vit(tensor(g["imgs_q"], torch.float32) / 16), g["target_tokens"], atol=1e-5)


def test_other_resolutions_interpolate_positions_and_say_so(capsys):
    vit = ijepa.load_encoder(GOLDEN / "tiny_ijepa.pth.tar", image_size=48, heads=2)
    assert "interpolated from 64 to 144" in capsys.readouterr().out
    assert vit(torch.zeros(1, 3, 48, 40)).shape == (1, 120, 12)
