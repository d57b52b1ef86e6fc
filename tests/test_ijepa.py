"""ijepa.py against the reference implementation's numbers (tests/golden/ijepa) and against its own promises."""

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
from ijepa import Config, World

GOLDEN = Path(__file__).parent / "golden" / "ijepa"
TINY = dict(image_size=32, patch=4, width=12, depth=5, heads=2, predictor_width=8, predictor_depth=2, predictor_heads=2)
ALONE = World(0, 1, torch.device("cpu"))


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=None):
    return torch.from_numpy(np.asarray(array)).to(dtype or torch.float64)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    torch.testing.assert_close(torch.as_tensor(actual).double(), tensor(expected), atol=atol, rtol=rtol)


def tiny(dtype=torch.float32):
    """(model, target) with the weights of the official-layout tiny checkpoint."""
    config = Config(**TINY)
    model, target = ijepa.build(config)
    path = GOLDEN / "tiny_ijepa.pth.tar"
    ijepa.load_weights(model, target, ijepa.read_checkpoint(path, heads=2), path)
    return model.to(dtype), target.to(dtype)


# ----------------------------------------------------------------------------------------------------------- parity


def test_positions():
    g = golden("pos_embed")
    for width, side in ((16, 8), (12, 8), (24, 3), (8, 5)):
        close(common.sincos_2d(width, side, side), g[f"pos_d{width}_g{side}"], atol=1e-12)
    close(common.sincos_2d(1280, 16, 16)[g["big_rows"]][:, g["big_cols"]], g["big_d1280_g16"], atol=1e-12)


@pytest.mark.parametrize("suffix", ["", "_b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_loss_and_gradients(suffix, dtype):
    g = golden("forward")
    model, target = tiny(dtype)
    images = tensor(g["imgs_q"], dtype) / 16
    masks_context, masks_target = (tensor(g[f"masks_{k}{suffix}"], torch.long) for k in ("enc", "pred"))
    patches = target.patch_embed.patchify(images)
    token_tolerance = dict(atol=2e-6, rtol=1e-5)
    close(model.encoder(patches, keep=masks_context), g[f"context_tokens{suffix}"], **token_tolerance)
    targets = ijepa.gather_targets(target(images), masks_target, len(masks_context)).to(dtype)
    close(targets, g[f"targets{suffix}"], **token_tolerance)
    predictions = model(patches, masks_context, masks_target)
    close(predictions.detach(), g[f"pred_out{suffix}"], **token_tolerance)
    loss = torch.nn.functional.smooth_l1_loss(predictions, targets)
    close(ijepa.jepa_loss(predictions.detach(), targets.float()), g[f"loss{suffix}"], rtol=1e-6)
    close(torch.nn.functional.mse_loss(predictions, targets).detach(), g[f"loss_mse{suffix}"], rtol=1e-6)
    loss.backward()
    for part, names in (("encoder", "enc"), ("predictor", "pred")):
        parameters = dict(getattr(model, part).named_parameters())
        norms = [parameters[n].grad.norm() for n in g[f"grad_names_{names}"]]
        close(torch.stack(norms), g[f"grad_norms_{names}{suffix}"], rtol=1e-4, atol=1e-9)


def test_bf16_autocast_keeps_the_reference_types():
    g = golden("forward")
    model, target = tiny()
    patches = target.patch_embed.patchify(tensor(g["imgs_q"], torch.float32) / 16)
    masks_context, masks_target = (tensor(g[f"masks_{k}"], torch.long) for k in ("enc", "pred"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        context = model.encoder(patches, keep=masks_context)
        tokens = target(patches)
        targets = ijepa.gather_targets(tokens, masks_target)
        predictions = model(patches, masks_context, masks_target)
        loss = ijepa.jepa_loss(predictions, targets)
    types = [str(x.dtype) for x in (context, predictions, tokens, targets, targets, loss)]
    assert types == list(g["dtypes_bf16_autocast"])
    close(loss, g["loss_bf16_autocast"], rtol=1e-2)


def test_readout_is_pooled_after_the_final_norm_only():
    g = golden("forward")
    model, target = tiny()
    images = tensor(g["imgs_q"], torch.float32) / 16
    for name, encoder in (("encoder", model.encoder), ("target", target)):
        pooled, concat4, tokens = ijepa.encode(encoder, images)
        close(tokens, g[f"{name}_tokens"], atol=1e-5)
        close(pooled, g[f"{name}_pooled"], atol=1e-5)
        close(concat4, g[f"{name}_concat4"], atol=1e-5)
        assert (pooled.double() - tensor(g[f"{name}_layernormed_pooled"])).abs().max() > 0.01


def test_schedules_to_the_last_step():
    g = golden("schedules")
    for name in ("in1k_h14", "ipe125", "short"):
        ipe, epochs, warmup, scale, start_lr, lr, final_lr, wd, final_wd, ema0, ema1 = g[f"{name}_config"]
        config = Config(warmup=warmup / epochs, lr=lr, lr_start=start_lr, lr_final=final_lr, schedule_scale=scale,
                        weight_decay=wd, weight_decay_final=final_wd, momentum=ema0, momentum_final=ema1)  # fmt: skip
        ours = np.array([ijepa.schedules(config, int(k) - 1, int(ipe * epochs)) for k in g[f"{name}_call"]])
        for i, key in enumerate(("lr", "wd", "ema")):
            np.testing.assert_allclose(ours[:, i], g[f"{name}_{key}"], rtol=0, atol=1e-12)


def test_parameter_groups():
    g = golden("param_groups")
    model, _ = tiny()
    names = {p: n for n, p in model.named_parameters()}
    optimizer = ijepa.make_optimizer(model)
    ours = {names[p]: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    theirs = {n: i for n, i, trained in zip(g["names"], g["group"], g["requires_grad"]) if trained}
    assert ours == theirs
    assert tuple(g["betas"]) == optimizer.defaults["betas"] and float(g["eps"]) == optimizer.defaults["eps"]
    decay = ijepa.schedules(Config(weight_decay=0.04, weight_decay_final=0.4), 0, 200)[1]
    decays = [decay if group["decay"] else 0 for group in optimizer.param_groups]
    np.testing.assert_allclose(decays, g["wd_after_first_step"], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_training_steps(dtype):
    """Masks, loss, gradients, schedules, AdamW and EMA together, against five steps of the reference."""
    g = golden("train_trace")
    model, _ = tiny(dtype)
    target = copy.deepcopy(model.encoder)
    ipe, epochs, warmup, scale, start_lr, lr, final_lr, wd, final_wd, ema0, ema1 = g["hyper"]
    config = Config(warmup=warmup / epochs, lr=lr, lr_start=start_lr, lr_final=final_lr, schedule_scale=scale,
                    weight_decay=wd, weight_decay_final=final_wd, momentum=ema0, momentum_final=ema1)  # fmt: skip
    optimizer, ema = ijepa.make_optimizer(model), common.EMA(target, model.encoder)
    exact = dtype == torch.float64
    for step in range(5):
        step_lr, decay, momentum = ijepa.schedules(config, step, int(ipe * epochs))
        np.testing.assert_allclose([step_lr, decay, momentum], [g["lr"][step], g["wd"][step], g["m"][step]], atol=1e-12)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = step_lr, decay if group["decay"] else 0.0
        patches = target.patch_embed.patchify(tensor(g["imgs_q"][step], dtype) / 16)
        masks_context, masks_target = (tensor(g[f"masks_{k}_{step}"], torch.long) for k in ("enc", "pred"))
        assert masks_context.shape[-1] == g["k_enc"][step] and masks_target.shape[-1] == g["k_pred"][step]
        with torch.no_grad():
            tokens = target(patches)
            picked = common.gather_tokens(tokens, masks_target)
            targets = torch.nn.functional.layer_norm(picked, picked.shape[-1:])  # gather_targets works in float32
        loss = torch.nn.functional.smooth_l1_loss(model(patches, masks_context, masks_target), targets)
        close(loss.detach(), g["loss"][step], rtol=1e-9 if exact else 1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()) if step % 2 else None)
    tolerance = dict(rtol=1e-9, atol=1e-10) if exact else dict(rtol=1e-3, atol=1e-4)
    for name, module in (("encoder", model.encoder), ("predictor", model.predictor), ("target", target)):
        state = module.state_dict()
        assert set(g[f"names_{name}"]) == set(state)
        close(torch.stack([state[n].norm() for n in g[f"names_{name}"]]), g[f"norms_{name}"], **tolerance)
    close(model.encoder.blocks[0].attn.qkv.weight.detach(), g["final_encoder_qkv0"], **tolerance)
    close(target.norm.weight, g["final_target_norm_weight"], **tolerance)
    close(model.predictor.mask_token.detach(), g["final_mask_token"], **tolerance)


def test_initialisation():
    g = golden("init")
    config = Config(
        image_size=64, patch=8, width=192, depth=12, heads=3, predictor_width=96, predictor_depth=4, patch_std=0.02
    )
    model, target = ijepa.build(config)
    for part in ("encoder", "predictor"):
        state = getattr(model, part).state_dict()
        assert set(g[f"{part}_names"]) == set(state)
        for name, shape, std, mean in zip(*(g[f"{part}_{k}"] for k in ("names", "shape", "std", "mean"))):
            ours = state[name]
            assert "x".join(map(str, ours.shape)) == shape
            if ours.numel() > 5000 and "pos_embed" not in name:
                assert abs(ours.std().item() / 0.02 - 1) < 0.05
                # the reference's weights of -2
                stray = [abs(std / math.sqrt(0.02**2 + 4 * j / ours.numel()) - 1) for j in (0, 1)]
                assert min(stray) < 0.05
            elif ours.dim() == 1 or "pos_embed" in name:
                np.testing.assert_allclose([ours.std().item(), ours.mean().item()], [std, mean], atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), target.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------ masks

MASK_CONFIGS = ["h14", "b16", "h16_448", "grid8", "overlap", "relax"]


def mask_config(name, **changes):
    numbers = golden("masks")[f"{name}_config"]
    size, patch, e0, e1, p0, p1, a0, a1, contexts, targets, min_keep, overlap, batch, calls, skip = numbers
    config = Config(image_size=int(size), patch=int(patch), context_scale=(e0, e1), target_scale=(p0, p1),
                    target_aspect=(a0, a1), contexts=int(contexts), targets=int(targets), min_keep=int(min_keep),
                    overlap=bool(overlap), batch=int(batch), masks="official", group=0)  # fmt: skip
    return replace(config, **changes), int(calls), int(skip)


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_reference_sampler_gives_the_golden_masks(name):
    """The plain sampler of tests/reference.py, image by image, is the reference of the batched one, compared below."""
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
    for u, expected in zip(np.linspace(0, 1, 101), g[f"{name}_size_of_u"]):
        target = ijepa.block_size(u, grid, config.target_scale, config.target_aspect)
        assert target + ijepa.block_size(u, grid, config.context_scale, (1, 1)) == tuple(expected)


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_golden_masks_from_the_batched_code(name):
    """Given the blocks of the golden masks, the batched code makes the same index lists, cut to the same length."""
    g = golden("masks")
    config, calls, skip = mask_config(name)
    grid = config.image_size // config.patch
    for call in range(calls):
        size, _ = ijepa.block_sizes(config, skip + call)
        expected = tensor(g[f"{name}_pred_{call}"], torch.long)
        first = expected[..., 0].T  # [B, M]: the top left corner
        blocks = ijepa.rectangles(torch.stack([first // grid, first % grid], dim=-1), size, grid)
        assert torch.equal(ijepa.to_indices(blocks, math.prod(size)), expected)


@pytest.mark.parametrize("name", MASK_CONFIGS)
def test_batched_sampler_has_the_reference_statistics(name):
    g = golden("masks")
    config, _, _ = mask_config(name, batch=1)
    stats = g[f"{name}_stats"]
    draws, kp_mean, kp_std, k_mean, k_std, k_min, k_max, union_mean, batch, batches, kt_mean, kt_std = stats
    batch, batches = int(batch), int(batches)
    n = (config.image_size // config.patch) ** 2
    # locations do not depend on the sizes' counter, so a few images a counter give the same coverage with less work
    cover_target, cover_context, kp, union, steps = torch.zeros(n), torch.zeros(n), [], [], 375
    lengths = []
    for step in range(1500):
        kp.append(math.prod(ijepa.block_sizes(config, step)[0]))
    np.testing.assert_allclose([np.mean(kp), np.std(kp)], [kp_mean, kp_std], rtol=1e-9)
    for step in range(0, 1500, 1500 // steps):
        for masks_context, masks_target in ijepa.sample_masks(replace(config, batch=4, group=1), step):
            lengths.append(masks_context.shape[-1])
            cover_context[masks_context[0, 0]] += 1
            cover_target[masks_target[0, 0]] += 1
            union.append(len(masks_target.unique()))
    drawn = len(lengths)
    for ours, key in ((cover_target, "pred"), (cover_context, "enc")):
        ours, theirs = ours / drawn, tensor(g[f"{name}_cov_{key}"], torch.float32)
        q = (ours + theirs) / 2
        limit = 5 * (2 * q * (1 - q) / min(drawn, draws)).sqrt() + 0.005
        assert ((ours - theirs).abs() <= limit).all(), (ours - theirs).abs().max()
        if not config.overlap or key == "pred":
            side = ours.view(int(n**0.5), -1)
            assert side[-1].max() == 0 and side[:, -1].max() == 0
    np.testing.assert_allclose([np.mean(lengths), np.mean(union)], [k_mean, union_mean], rtol=0.05)
    cut, cover = [], torch.zeros(n)
    for step in range(batches):
        ((masks_context, _),) = ijepa.sample_masks(replace(config, batch=batch), step)
        cut.append(masks_context.shape[-1])
        cover += torch.bincount(masks_context.flatten(), minlength=n) / masks_context.shape[0] / batch
    np.testing.assert_allclose(np.mean(cut), kt_mean, rtol=0.1)
    difference = (cover / batches - tensor(g[f"{name}_cov_enc_batch"], torch.float32)).abs().max()
    assert difference < (0.2 if name == "h16_448" else 0.1)


def test_masks_do_not_depend_on_who_asks():
    config = Config(batch=64, group=16, seed=3)
    whole = ijepa.sample_masks(config, 7)
    for first, last in ((0, 32), (32, 64), (16, 32), (40, 44)):
        part = ijepa.sample_masks(config, 7, first, last)
        for ours, theirs in zip(part, whole[first // 16 :], strict=False):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    other = ijepa.sample_masks(replace(config, seed=4), 7)
    assert not torch.equal(other[0][1], whole[0][1])


def test_corrected_masks():
    """No target in the context, borders reached, contexts cut at random and never below min_context."""
    config = Config(image_size=32, patch=4, min_keep=4, min_context=8, batch=256)
    cover = torch.zeros(64)
    for step in range(20):
        ((masks_context, masks_target),) = ijepa.sample_masks(config, step)
        assert masks_context.shape[-1] >= 8
        assert (masks_context.diff(dim=-1) > 0).all() and (masks_target.diff(dim=-1) > 0).all()
        taken = torch.zeros(256, 64, dtype=torch.bool).scatter_(1, masks_target.transpose(0, 1).flatten(1), True)
        assert not taken.gather(1, masks_context[0]).any()
        cover += torch.bincount(masks_context.flatten(), minlength=64)
    cover = (cover / cover.sum()).view(8, 8)
    assert cover.min() > 0.2 / 64, "some patches are hardly ever context"
    assert abs(cover[:4].sum() - 0.5) < 0.02, "the cut favours the top or the bottom"


def test_impossible_masks_are_refused(capsys):
    config = Config(image_size=32, patch=16, masks="official", min_keep=10)
    with pytest.raises(SystemExit) as stop:
        ijepa.check(config, ALONE)
    assert stop.value.code == 2 and "--min-keep" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ crops


def test_random_crop_draws_are_the_reference_draws():
    g = golden("crops")
    for case in range(4):
        width, height, _, low, high = g[f"case{case}_config"]
        random = torch.Generator().manual_seed(6000 + case)
        ours = [ijepa.random_crop(int(width), int(height), (low, high), random) for _ in range(40)]
        np.testing.assert_array_equal(ours, g[f"case{case}"])


def test_train_transform_pixels():
    """Both resamplers against the reference's crop, resize, normalise."""
    g = golden("crops")
    Image.fromarray(g["image"]).save("image.png")
    image = torch.from_numpy(g["image"]).permute(2, 0, 1)[None].double()
    for box, expected in zip(g["transformed_params"].tolist(), torch.from_numpy(g["transformed"]), strict=True):
        top, left, height, width = torch.tensor(box).double()[:, None]
        rows, columns = (ijepa.resampling_weights(s, n, i, 16) for s, n, i in ((top, height, 40), (left, width, 56)))
        # PIL resamples the columns first and rounds in between, halves up
        exact = (rows[:, None] @ (image @ columns.transpose(1, 2)[:, None] + 0.5).floor() + 0.5).floor()
        difference = (ijepa.normalize(exact)[0] - expected).abs()
        assert (difference > 1e-5).sum() <= 2, "more than the few values halfway between two grey levels"
        ours = ijepa.normalize(ijepa.crop_resize(image, torch.tensor([box]).float(), 16))
        assert (ours[0] - expected).abs().max() < 0.018 * 1.01  # one grey level: nothing is rounded here
        file, size = ijepa.decode("image.png", lambda w, h, box=box: box, (16, 16))
        assert size == (56, 40)
        # resize(box=) sees a little beyond the crop
        assert (ijepa.normalize(file[None])[0] - expected).abs().mean() < 0.02


def test_batched_crops_have_the_same_distribution():
    for size in ((500, 375), (32, 32), (900, 100)):
        seeded = [torch.Generator().manual_seed(i) for i in range(2000)]
        single = torch.tensor([ijepa.random_crop(*size, (0.3, 1.0), g) for g in seeded]).double()
        sizes = torch.tensor([size]).expand(2000, 2)
        batched = ijepa.random_crops(sizes, (0.3, 1.0), torch.Generator().manual_seed(0)).double()
        error = (single.var(0) / 2000 + batched.var(0) / 2000).sqrt() + 1e-9
        assert ((single.mean(0) - batched.mean(0)).abs() < 4.5 * error).all()
        torch.testing.assert_close(single.std(0), batched.std(0), rtol=0.1, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_knn():
    g = golden("eval")
    train, labels, test = tensor(g["knn_train"]), tensor(g["knn_train_y"], torch.long), tensor(g["knn_test"])
    for k, scores in ijepa.knn(train, labels, test, ks=(5, 20)).items():
        close(scores, g[f"knn_scores_k{k}"], rtol=1e-5)
        np.testing.assert_array_equal(scores.argmax(1), g[f"knn_pred_k{k}"])
        top1 = ijepa.accuracy(scores, tensor(g["knn_test_y"], torch.long)).item()
        assert top1 == pytest.approx(float(g[f"knn_top1_k{k}"]))


def test_lars():
    g = golden("eval")
    lr, momentum, decay, eta = g["lars_hyper"]
    weights = [tensor(g["lars_w0"])[None], tensor(g["lars_b0"])[None]]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        gradients = [tensor(g["lars_gw"][step])[None], tensor(g["lars_gb"][step])[None]]
        ijepa.lars_step(weights, gradients, momenta, torch.tensor([lr]), torch.tensor([decay]), momentum, eta)
        close(weights[0][0], g["lars_w"][step], rtol=1e-10)
        close(weights[1][0], g["lars_b"][step], rtol=1e-10)


def test_probe_heads_are_a_plain_probe_each():
    """All heads in one batch learn what separate BatchNorm + Linear heads under torch.optim.SGD learn."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 6) * 3 + 1, torch.randint(0, 4, (64,))
    config = Config(probe="sgd", probe_batch=64, probe_lrs=(0.1, 0.4), probe_decays=(0.01,))
    heads = ijepa.ProbeHeads(6, 4, config, "cpu")
    linear = [w.detach().clone() for w in heads.linear]
    for _ in range(5):
        heads.step(x, y, 1.0)
    for i, (name, lr) in enumerate(zip(heads.names, heads.lr.tolist(), strict=True)):
        norm = torch.nn.BatchNorm1d(6) if "batch norm" in name else torch.nn.Identity()
        layer = torch.nn.Linear(6, 4)
        layer.weight.data, layer.bias.data = linear[0][i].clone(), linear[1][i].clone()
        groups = [{"params": list(layer.parameters()), "weight_decay": 0.01}, {"params": list(norm.parameters())}]
        optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, nesterov=True)
        head = torch.nn.Sequential(norm, layer)
        for _ in range(5):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(head(x), y).backward()
            optimizer.step()
        torch.testing.assert_close(heads.linear[0][i].detach(), layer.weight.detach(), atol=1e-5, rtol=1e-4)
        top1 = (head.eval()(x).argmax(1) == y).double().mean().item() * 100
        assert heads.evaluate(x, y)[i].item() == pytest.approx(top1)
