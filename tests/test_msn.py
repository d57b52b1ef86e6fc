"""msn.py against the reference implementation's numbers (tests/golden/msn) and its own promises."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import free_port, on_ranks
from PIL import Image, ImageFilter

import common
import msn
from msn import Config

GOLDEN = Path(__file__).parent / "golden" / "msn"
TINY = {"image_size": 16, "patch": 4, "focal_size": 8, "width": 16, "heads": 2, "depth": 2}
TINY.update(head_hidden=20, embedding=12, prototypes=10, batch=4, focal_views=3, drop=0.3)
# Analytically these have no gradient: after Adam's steps they hold noise
NOISE = ("fc.fc1.bias", "fc.fc2.bias", "attn.qkv.bias")


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual, expected = (torch.as_tensor(np.asarray(x)).double() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def tiny():
    """Return (model, target) with the weights of the released layout's tiny checkpoint."""
    model, target = msn.build(Config(**TINY))
    path = GOLDEN / "tiny_msn.pth.tar"
    msn.load_weights(model, target, msn.read_weights(path, heads=2), path)
    return model, target


def noise(name):
    return name.endswith(NOISE) or name in ("norm.bias", "encoder.norm.bias")


def official(name):
    """Return our parameter's name in the reference's flat layout."""
    return name.removeprefix("network.").removeprefix("encoder.")


def views_of(g):
    return [tensor(g[f"view{i}"]) for i in range(5)]


def chw(array):
    """Return a golden image [H, W, 3] as a batch of one, float [1, 3, H, W]."""
    return tensor(array).permute(2, 0, 1)[None]


# ----------------------------------------------------------------------------------------------------------- parity


def test_forward_in_evaluation_mode():
    g = golden("forward")
    _, target = tiny()
    target.eval()
    vit, views = target.encoder, views_of(g)
    with torch.no_grad():
        close(vit(views[0]), g["tokens_target_view"], atol=1e-5)
        close(vit(views[2]), g["tokens_focal_view"], atol=1e-5)
        close(vit(views[0])[:, 0], g["cls_before_head"], atol=1e-5)
        close(torch.cat([target(v) for v in views]), g["embed_eval_list"], atol=1e-5)
        close(msn.encode(vit, views[0]), g["blocks1"], atol=1e-5)
        first, last = vit(views[0], layers=2)
        pooled = torch.cat([first[:, 0], last[:, 0], last[:, 1:].mean(1)], dim=1)
        close(pooled, g["lastn2_avgpool"], atol=1e-5)
        x = vit.blocks[0](vit.embed(views[0]))
        both = torch.cat([x[:, 0], vit.blocks[1](x)[:, 0]], dim=1)
        close(both, g["blocks2"], atol=1e-5)
        heads = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(x)).view(4, 17, 3, 2, 8)
        q, k, _ = heads.permute(2, 0, 3, 1, 4)
        close((q @ k.mT * 8**-0.5).softmax(-1), g["attn_last"], atol=1e-5)
        keep = tensor(g["blocks1_drop_keep"], torch.long) - 1
        x = vit.embed(views[0], keep.expand(4, -1))
        for block in vit.blocks:
            x = block(x)
        close(x[:, 0], g["blocks1_drop"], atol=1e-5)
        for size in (8, 12, 24, 32):
            table = common.interpolate_positions(vit.pos_embed, (size // 4, size // 4))
            close(table, g[f"pos_embed_{size}px"], atol=1e-5)


def test_forward_in_training_mode_and_batch_statistics():
    g = golden("forward")
    views = views_of(g)
    _, target = tiny()
    with torch.no_grad():
        close(target.train()(views[0]), g["embed_target_train"], atol=1e-5)
    close(target.fc.bn1.running_mean, g["bn1_running_mean_after_target"], atol=1e-5)
    close(target.fc.bn1.running_var, g["bn1_running_var_after_target"], atol=1e-5)
    model, _ = tiny()
    keep = (tensor(g["anchor_keep"], torch.long) - 1).expand(4, -1)
    z, prototypes = model.train()(views[1], keep, torch.cat(views[2:]))
    close(z.detach(), g["embed_anchor_train"], atol=1e-5)
    close(prototypes.norm(dim=1).detach(), np.ones(10), atol=1e-6)
    close(model.network.fc.bn1.running_mean, g["bn1_running_mean_after_anchor"], atol=1e-5)
    close(model.network.fc.bn2.running_var, g["bn2_running_var_after_anchor"], atol=1e-5)


def test_positions_of_other_sizes():
    g = golden("pos_embed")
    checked = 0
    for key in (k for k in g.files if k.endswith("_in") and g[k].size):
        patch, _, size = (int(v) for v in key[1:-3].split("_"))
        found = common.interpolate_positions(tensor(g[key]), (size // patch, size // patch))
        close(found, g[key[:-3] + "_out"], atol=1e-5)
        checked += 1
    assert checked == 5
    vit = common.ViT(28, 7, 8, 1, 2, class_token=True)
    assert vit(torch.zeros(1, 3, 12, 12)).shape == (1, 2, 8)  # what no patch fits is cut off


def test_initial_weights():
    g = golden("init")
    sizes = {"image_size": 224, "patch": 16, "width": 192, "depth": 12, "heads": 3}
    config = Config(**sizes, head_hidden=2048, embedding=256, init_std=0.02, patch_std=0.0)
    _, target = msn.build(config)
    assert sum(p.numel() for p in target.parameters()) == g["n_params"]
    assert sum(p.numel() for p in target.encoder.parameters()) == g["n_params_trunk"]
    ours = {official(n): p for n, p in target.named_parameters()}
    for name, std, mean, shape in zip(g["names"], g["std"], g["mean"], g["shape"], strict=True):
        weight = ours[str(name)]
        assert ",".join(map(str, weight.shape)) == shape
        close(weight.std().detach(), std, rtol=0.25 if name == "cls_token" else 0.05, atol=1e-9)
        close(weight.mean().detach(), mean, atol=0.2 * std + 1e-9)
    model, _ = msn.build(replace(config, depth=1))
    assert 0.95 < model.prototypes.abs().max() * 16 <= 1


SIZES = {  # trunk parameters
    "vit_s16_in1k": 21_665_664,
    "vit_b16_in1k": 85_798_656,
    "vit_b8_in1k": 85_807_872,
    "vit_b4_in1k": 87_503_616,
    "vit_l16_in1k": 303_301_632,
    "vit_l7_in1k": 303_513_600,
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_presets_have_the_papers_sizes(name):
    config, _ = common.parse_config(Config, msn.PRESETS, msn.DATA_PRESETS, ["--preset", name])
    with torch.device("meta"):
        model = msn.MSN(config)
    assert sum(p.numel() for p in model.network.encoder.parameters()) == SIZES[name]
    msn.check(config, common.World(0, 16))


@pytest.mark.parametrize(
    "case", ["sinkhorn_T0.25", "plain_T0.25", "plain_T0.5", "small_norm_T0.25"]
)
def test_loss_and_gradients(case):
    g = golden("loss")
    anchors = tensor(g[f"{case}_anchors"]).requires_grad_()
    prototypes = tensor(g["prototypes"]).requires_grad_()
    targets = tensor(g[f"{case}_targets_z"])
    rounds = 3 if case.startswith("sinkhorn") else 0
    sharpen = float(case.split("_T")[1])
    unit = F.normalize(prototypes, dim=1)
    cross_entropy, me_max, assigned = msn.msn_loss(anchors, targets, unit, rounds, sharpen)
    close(cross_entropy.detach(), g[f"{case}_loss"], atol=1e-5)
    close(me_max.detach(), g[f"{case}_me_max"], atol=1e-5)
    close(assigned, g[f"{case}_target_probs"], atol=1e-5)
    assert len(assigned.argmax(1).unique()) == g[f"{case}_np"]
    close(assigned.amax(1).mean(), g[f"{case}_max_t"], atol=1e-5)
    (cross_entropy + float(g[f"{case}_lambda"]) * me_max).backward()
    close(anchors.grad, g[f"{case}_grad_anchors"], atol=1e-5)
    close(prototypes.grad, g[f"{case}_grad_prototypes"], atol=1e-5)
    if not rounds:  # sharpening is a temperature of 0.1 * T
        cosine = F.normalize(targets, dim=1) @ unit.detach().T
        close(assigned, (cosine / (0.1 * sharpen)).softmax(1), atol=1e-5)


def test_sinkhorn():
    g = golden("loss")
    log_q = tensor(g["sinkhorn_in"]).log()
    close(msn.sinkhorn(log_q, 3).exp(), g["sinkhorn_out"], atol=1e-5)
    close(msn.sinkhorn(log_q, 1).exp(), g["sinkhorn_out_1itr"], atol=1e-5)
    dead = msn.sinkhorn(
        torch.tensor([[0.0, -300.0], [-1.0, -300.0]]), 3
    )  # an unused prototype in float32
    assert dead.isfinite().all()


def on_two_ranks(rank, port, results):
    """The golden two-rank case on gloo: what each rank's loss and gradients are."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    g, found = golden("distributed"), {}
    for name, rounds in (("sinkhorn", 3), ("plain", 0)):
        anchors = tensor(g["anchors"][rank]).requires_grad_()
        prototypes = tensor(g["prototypes"]).requires_grad_()
        cross_entropy, me_max, assigned = msn.msn_loss(
            anchors, tensor(g["targets"][rank]), F.normalize(prototypes, dim=1), rounds
        )
        (cross_entropy + float(g[f"{name}_lambda"]) * me_max).backward()
        found[f"{name}_ce_r{rank}"] = cross_entropy.item()
        found[f"{name}_me_max_r{rank}"] = me_max.item()
        found[f"{name}_target_probs_r{rank}"] = assigned
        found[f"{name}_grad_anchors_r{rank}"] = anchors.grad
        found[f"{name}_grad_proto_local_r{rank}"] = prototypes.grad
    norm, alone = msn.BatchNorm(7), torch.nn.BatchNorm1d(7)
    whole = tensor(g["anchors"])
    x, y = whole[rank].clone().requires_grad_(), whole.flatten(0, 1).clone().requires_grad_()
    out, expected = norm(x), alone(y)
    (out * whole[1 - rank]).sum().backward()
    # DDP takes the mean over ranks
    (expected * whole.flip(0).flatten(0, 1)).sum().mul(0.5).backward()
    close(out.detach(), expected.detach()[rank * 9 : rank * 9 + 9], atol=1e-5)
    close(x.grad / 2, y.grad[rank * 9 : rank * 9 + 9], atol=1e-5)
    close(norm.running_var, alone.running_var, atol=1e-6)
    torch.save(found, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_loss_and_batch_norm_on_two_ranks(tmp_path):
    on_ranks(on_two_ranks, free_port(), tmp_path, ranks=2)
    g, found = golden("distributed"), {}
    for rank in range(2):
        found |= torch.load(tmp_path / f"{rank}.pt", weights_only=True)
    for key, value in found.items():
        close(value, g[key], atol=2e-6)
    for name in ("sinkhorn", "plain"):
        local = [found[f"{name}_grad_proto_local_r{rank}"] for rank in range(2)]
        close(sum(local), g[f"{name}_grad_proto_summed"], atol=2e-6)
        close(sum(local) / 2, g[f"{name}_single_grad_proto"], atol=2e-6)  # ours: the true gradient
        close(
            np.mean([found[f"{name}_ce_r{rank}"] for rank in range(2)]),
            g[f"{name}_single_ce"],
            atol=2e-6,
        )


def schedule_config(numbers):
    """Return Config(...) of golden numbers: E, epochs, warmup, lrs, weight decays."""
    _, epochs, warmup, start_lr, lr, final_lr, wd, final_wd = numbers
    rates = {"warmup": warmup / epochs, "lr": lr, "lr_start": start_lr, "lr_final": final_lr}
    rates.update(weight_decay=wd, weight_decay_final=final_wd, momentum=0.996, schedule_scale=1.25)
    return Config(**TINY, **rates)


def test_schedules_and_kept_patches():
    g = golden("schedules")
    for name in ("vits16", "tiny"):
        per_epoch, epochs = g[f"{name}_cfg"][:2]
        config = schedule_config(g[f"{name}_cfg"])
        steps = int(per_epoch * epochs)
        ours = np.array([msn.schedules(config, int(s), steps) for s in g[f"{name}_step"]])
        for i, key in enumerate(("lr", "wd", "momentum")):
            np.testing.assert_allclose(ours[:, i], g[f"{name}_{key}"], rtol=1e-12)
    for patches, drop, kept in zip(g["keep_N"], g["keep_drop"], g["keep_T"], strict=True):
        assert msn.kept_patches(int(patches), float(drop)) == kept


def test_parameter_groups():
    g = golden("param_groups")
    model, _ = tiny()
    names = {p: official(n) for n, p in model.named_parameters()}
    groups = msn.make_optimizer(model).param_groups
    decayed, undecayed, prototypes = ({names[p] for p in group["params"]} for group in groups)
    assert decayed == set(g["decay"]) and undecayed == set(g["no_decay"])
    assert prototypes == {"prototypes"} and not groups[2]["decay"]
    assert {"cls_token", "pos_embed"} <= decayed


@pytest.mark.parametrize("tag", ["sinkhorn", "plain"])
def test_four_training_steps(tag):
    """Loss, gradients, clipping, schedules, AdamW and EMA together, against four reference steps."""
    g, views = golden("train_trace"), views_of(golden("forward"))
    clip, weight, rounds = g[f"{tag}_hyper"][8:]
    config = schedule_config(g[f"{tag}_hyper"][:8])
    steps = int(g[f"{tag}_hyper"][0] * g[f"{tag}_hyper"][1])
    model, _ = tiny()
    target = copy.deepcopy(model.network)
    optimizer = msn.make_optimizer(model)
    ema = common.EMA(target, model.network)
    network = list(model.network.parameters())
    qkv = [block.attn.qkv.weight for block in model.network.encoder.blocks]
    for step in range(4):
        rates = msn.schedules(config, step, steps)
        expected = [g[f"{tag}_{k}"][step] for k in ("lr", "wd", "m")]
        np.testing.assert_allclose(rates, expected, 1e-12)
        common.set_rates(optimizer, *rates[:2])
        keep = (tensor(g[f"{tag}_keep"][step], torch.long) - 1).expand(4, -1)
        with torch.no_grad():
            h = target(views[0])
        z, prototypes = model(views[1], keep, torch.cat(views[2:]))
        cross_entropy, me_max, assigned = msn.msn_loss(z, h, prototypes, 3 * int(rounds))
        loss = cross_entropy + weight * me_max
        loss.backward()
        found = {"loss": loss, "ce": cross_entropy, "me_max": me_max}
        found["max_t"] = assigned.amax(1).mean()
        found["entropy"] = (
            torch.special.entr(msn.log_assignments(z, prototypes).exp()).sum(1).mean()
        )
        for key, value in found.items():
            close(value.detach(), g[f"{tag}_{key}"][step], atol=1e-3)
        assert len(assigned.argmax(1).unique()) == g[f"{tag}_np"][step]
        norms = {"gnorm": torch.nn.utils.get_total_norm([p.grad for p in network])}
        norms["proto_gnorm"] = model.prototypes.grad.norm()
        norms.update(first_qkv_gnorm=qkv[0].grad.norm(), last_qkv_gnorm=qkv[1].grad.norm())
        for key, value in norms.items():
            close(value, g[f"{tag}_{key}"][step], rtol=1e-3)
        torch.nn.utils.clip_grad_norm_(network, clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(rates[2], torch.ones(()))
    close(model.prototypes.detach(), g[f"{tag}_prototypes_final"], atol=1e-4)
    ours = {official(n): p.detach() for n, p in model.network.named_parameters()}
    theirs = {official(n): p.detach() for n, p in target.named_parameters()}
    kept = [i for i, n in enumerate(g["param_names"]) if not noise(str(n))]
    assert len(g["param_names"]) - len(kept) == 5  # norm.bias, fc1.bias, fc2.bias, two qkv biases
    for i in kept:
        name = str(g["param_names"][i])
        close(ours[name].norm(), g[f"{tag}_encoder_norms"][i], rtol=1e-3)
        close(ours[name].sum(), g[f"{tag}_encoder_sums"][i], atol=1e-3)
        close(theirs[name].norm(), g[f"{tag}_target_norms"][i], rtol=1e-3)
    if tag == "sinkhorn":  # the trainer's own file, written after these steps
        weights = msn.read_weights(GOLDEN / "tiny_msn_train.pth.tar", heads=2)
        close(weights["prototypes"], model.prototypes.detach(), atol=1e-3)
        for part, module in (("network", model.network), ("target", target)):
            for name, value in module.state_dict().items():
                if not noise(official(name)) and "num_batches" not in name:
                    atol = 2e-2 if "running" in name else 1e-3
                    close(value, weights[part][name], atol=atol)


# ------------------------------------------------------------------------------------------ views


def test_views():
    """Crop, jitter, grey and blur, each on its stored input, and the whole chain."""
    g = golden("views")
    split = common.in_memory(g["image"][None], np.zeros(1, int), ["any"], "train")
    for v in ("v0", "v1", "v2", "v3"):
        crop = chw(g[f"{v}_crop"])
        box = g[f"{v}_box_tlhw"].tolist()
        (part,) = split.read(0, lambda width, height, box=box: [box], [crop.shape[-1]])
        # the reference crops before it resizes, so at the edges it sees nothing beyond the crop
        assert (part - crop).abs().mean() < 3
        x = crop.flip(3) if g[f"{v}_flip"] else crop
        flipped = x
        order = g[f"{v}_order"].tolist()
        amounts = torch.zeros(1, 7)
        amounts[0, 1:5] = tensor(g[f"{v}_factors_bcsh"])
        amounts[0, 6] = float(g[f"{v}_blur_radius"])
        for operation, expected in zip(order, g[f"{v}_jitter_stages"], strict=True):
            function = msn.OPERATIONS[1 + operation]
            difference = (function(x, amounts[:, 1 + operation]) - chw(expected)).abs()
            assert difference.max() <= (7 if operation == 3 else 2)
            assert difference.mean() < 0.3
            x = chw(expected)
        close(x, chw(g[f"{v}_jitter"]))
        x = msn.grey_levels(x).expand_as(x) if g[f"{v}_gray"] else x
        blurred = chw(g[f"{v}_blur"])
        assert (msn.blur(x, amounts[:, 6]) - blurred).abs().max() <= 3
        places = [-1, *[1 + operation for operation in order], 5 if g[f"{v}_gray"] else -1]
        places.append(6 if amounts[0, 6] else -1)
        whole = msn.augment(flipped.clone(), torch.tensor([places]), amounts)
        assert (whole - blurred).abs().mean() < 2  # errors add up
        close(common.normalize(blurred)[0], g[f"{v}_final"], atol=2e-3)


def test_grey_hue_and_blur_against_pil():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (31, 29, 3), dtype=np.uint8)
    pil = Image.fromarray(image)
    np.testing.assert_array_equal(msn.grey_levels(chw(image))[0, 0], np.asarray(pil.convert("L")))
    for sigma in (0.1, 0.7, 1.0, 1.9, 3.1):
        expected = chw(pil.filter(ImageFilter.GaussianBlur(sigma)))
        difference = msn.blur(chw(image), torch.tensor([sigma])) - expected
        assert difference.abs().max() <= 3, sigma
    for turns in (-0.1, 0.03, 0.5):
        h, s, v = (np.asarray(band) for band in pil.convert("HSV").split())
        h = ((h.astype(int) + math.trunc(255 * turns)) % 256).astype(np.uint8)
        bands = [Image.fromarray(band) for band in (h, s, v)]
        expected = chw(Image.merge("HSV", bands).convert("RGB"))
        difference = (msn.hue(chw(image), torch.tensor([turns])) - expected).abs()
        assert difference.max() <= 7 and difference.mean() < 0.1


def test_a_batch_is_augmented_as_its_images_one_by_one():
    order, amounts = msn.draw_augmentation(torch.rand(24, 15, generator=common.generator(0)), 0.5)
    images = torch.randint(0, 256, (24, 3, 16, 16), generator=common.generator(1)).float()
    together = msn.augment(images.clone(), order, amounts)
    for i in range(24):
        alone = msn.augment(images[i : i + 1].clone(), order[i : i + 1], amounts[i : i + 1])
        assert torch.equal(alone[0], together[i])
    order[:12] = -1
    untouched = msn.augment(images.clone(), order, amounts)[:12]
    assert torch.equal(untouched, images[:12])


def test_photometric_draws_follow_the_paper():
    u = torch.rand(40000, 15, generator=common.generator(0))
    order, amounts = msn.draw_augmentation(u, 0.5)
    present = (order[..., None] == torch.arange(7)).any(1).float().mean(0)
    close(present, [0.5, 0.8, 0.8, 0.8, 0.8, 0.2, 0.5], atol=0.01)
    close(amounts.amin(0)[[1, 2, 3, 4, 6]], [0.6, 0.6, 0.6, -0.1, 0.1], atol=2e-3)
    close(amounts.amax(0)[[1, 2, 3, 4, 6]], [1.4, 1.4, 1.4, 0.1, 2.0], atol=2e-3)
    jittered = order[order[:, 1] > 0]
    places = [(jittered == number).float().argmax(1).float().mean() for number in range(1, 5)]
    close(torch.stack(places), [2.5] * 4, atol=0.03)


def test_crop_statistics():
    g = golden("views")
    for key in (k for k in g.files if k.startswith("stat_")):
        _, kind, size = key.split("_")
        height, width = map(int, size.split("x"))
        scale = (0.3, 1.0) if kind == "rand" else (0.05, 0.3)
        random = common.generator(key)
        boxes = [common.random_crop(width, height, scale, random) for _ in range(30000)]
        top, left, h, w = torch.tensor(boxes).double().unbind(1)
        share, ratio = h * w / (height * width), (w / h).log()
        quantiles = share.quantile(torch.tensor([0.1, 0.5, 0.9]).double())
        ours = [share.mean(), *quantiles, ratio.mean(), ratio.std()]
        ours += [(top / (height - h).clamp(min=1)).mean(), (left / (width - w).clamp(min=1)).mean()]
        close(torch.stack(ours), g[key], atol=0.02)


def test_masks_and_crops_are_a_function_of_step_and_image():
    config = Config(image_size=32, patch=4, batch=8, drop=0.3, focal_size=16)
    shared = msn.sample_keep(config, 3)
    assert shared.shape == (8, msn.kept_patches(64, 0.3)) and (shared == shared[:1]).all()
    each = msn.sample_keep(replace(config, mask_per="image"), 3)
    assert each.shape == shared.shape and not torch.equal(each[0], each[1])
    assert all(len(set(row)) == 44 for row in each.tolist())
    counts = torch.zeros(64)
    for step in range(2000):
        counts[msn.sample_keep(config, step)[0]] += 1
    assert (counts / 2000 - 44 / 64).abs().max() < 0.05
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 30, 3), dtype=np.uint8)
    split = common.in_memory(pixels, np.zeros(20, int), ["any"], "train")
    *whole, bad = msn.make_views(split, config, 0, 1, 3)
    halves = [msn.make_views(split, config, rank, 2, 3)[:3] for rank in (0, 1)]
    assert [tuple(x.shape) for x in whole] == [(2, 8, 3, 32, 32), (2, 8, 3, 16, 16), (8, 44)]
    for a, b, dim in zip(whole, zip(*halves, strict=True), (1, 1, 0), strict=True):
        assert torch.equal(a, torch.cat(b, dim))
    augmented = [msn.augment_views(half[1], config, "focal", 3, r) for r, half in enumerate(halves)]
    alone = msn.augment_views(whole[1], config, "focal", 3)
    torch.testing.assert_close(torch.cat(augmented, 1), alone)
    assert not torch.equal(whole[0], msn.make_views(split, config, 0, 1, 4)[0])


# ------------------------------------------------------------------------------------- evaluation


def test_logistic_regression_finds_the_optimum():
    g = golden("logistic")
    x, y, test_x, test_y = (torch.from_numpy(g[k]) for k in ("X", "y", "Xtest", "ytest"))
    close(msn.standardise(x), g["X_pre"], atol=1e-6)
    close(msn.standardise(test_x), g["Xtest_pre"], atol=1e-6)
    for ridge in (0.0025, 0.075, 1.0):
        weight = msn.logistic_regression(msn.standardise(x), y, 6, ridge)
        scores = msn.standardise(x).double() @ weight.T
        objective = F.cross_entropy(scores, y) + ridge / (2 * len(x)) * weight.square().sum()
        close(objective, g[f"lam{ridge}_objective"], atol=1e-6)
        train = float(g[f"lam{ridge}_train_acc"])
        assert common.top1(scores, y) / 100 == pytest.approx(train, abs=1 / 60 + 1e-6)
        found = common.top1(msn.standardise(test_x).double() @ weight.T, test_y) / 100
        for key in (f"lam{ridge}_test_acc", f"lam{ridge}_cyanure_acc_tol1e-3"):
            assert found == pytest.approx(float(g[key]), abs=1 / 200 + 1e-6)


def test_linear_probe_steps():
    g = golden("linear_eval")
    head = torch.nn.Sequential(torch.nn.LayerNorm(16), msn.L2Norm(), torch.nn.Linear(16, 5))
    names = {"norm.weight": "0.weight", "norm.bias": "0.bias"}
    names.update({"linear.weight": "2.weight", "linear.bias": "2.bias"})
    parameters = dict(head.named_parameters())
    for theirs, ours in names.items():
        parameters[ours].data.copy_(tensor(g[f"lin_init_{theirs}"]))
    decayed = parameters.pop("2.weight")
    groups = [{"params": [*parameters.values()], "lr": 6.4, "weight_decay": 0.0}]
    groups.append({"params": [decayed], "lr": 6.4, "weight_decay": float(g["lin_wd"])})
    optimizer = msn.SGD(groups, steps=4)
    for step in range(4):
        close(6.4 * common.cosine_schedule(step, 4, 1.0, 0.0), g["lin_lrs"][step], rtol=1e-6)
        loss = F.cross_entropy(head(tensor(g["lin_X"][step])), torch.from_numpy(g["lin_Y"][step]))
        close(loss.detach(), g["lin_losses"][step], atol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for theirs, ours in names.items():
        close(dict(head.named_parameters())[ours].detach(), g[f"lin_final_{theirs}"], atol=1e-4)


def test_labelled_subsets(tmp_path):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [4, 300, 96]))
    split = common.in_memory(np.zeros((400, 2, 2, 3), np.uint8), labels, list("abc"), "train")
    subsets = msn.labelled_subsets(split, "")
    sizes = {
        name: [few.labels.bincount().tolist() for few in draws] for name, draws in subsets.items()
    }
    assert sizes["1-shot"] == [[1, 1, 1]] * 3 and sizes["5-shot"] == [[4, 5, 5]] * 3
    assert sizes["1 %"] == [[1, 3, 1]] * 3
    assert len({few.names[1] for few in subsets["1-shot"]}) > 1
    (tmp_path / "list.txt").write_text("\n".join(split.names[5:7]))
    (listed,) = msn.labelled_subsets(split, tmp_path / "list.txt")["1 %"]
    assert listed.names == split.names[5:7]


def test_random_crops_of_the_probe():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 30, 3), dtype=np.uint8)
    split = common.in_memory(pixels, np.arange(9), list("abcdefghi"), "train")
    crops = [msn.RandomCrops(**vars(split), key=(0, "probe", epoch)) for epoch in (0, 0, 1)]
    read = [common.centre_crops(x, 16, list(range(9)))[1] for x in crops]
    assert torch.equal(read[0], read[1]) and not torch.equal(read[0], read[2])
    assert read[0].shape == (9, 3, 16, 16)


# ---------------------------------------------------------------------------------------- weights


def test_official_checkpoint():
    g = golden("forward")
    vit = msn.load_encoder(GOLDEN / "tiny_msn.pth.tar", heads=2)
    close(vit(views_of(g)[0]), g["tokens_target_view"], atol=1e-5)
    larger = msn.load_encoder(GOLDEN / "tiny_msn.pth.tar", image_size=32, heads=2)
    assert larger(torch.zeros(1, 3, 32, 32)).shape == (1, 65, 16)


def test_hub_checkpoint():
    path = GOLDEN.parent / "hub" / "msn" / "model.safetensors"
    expected = np.load(path.with_name("expected.npz"))
    vit = msn.load_encoder(path, heads=2)
    close(vit(torch.from_numpy(expected["images"])), expected["tokens"], atol=1e-5)


def test_learned_positions_need_no_width_that_four_divides():
    config = Config(**{**TINY, "width": 15, "heads": 3})
    msn.check(config, common.World())
    model, target = msn.build(config)
    flat = {f"module.{official(name)}": value for name, value in target.state_dict().items()}
    torch.save({"target_encoder": flat, "prototypes": model.prototypes.data}, "wide.pth.tar")
    vit = msn.load_encoder("wide.pth.tar", heads=3)
    images = torch.rand(2, 3, 16, 16)
    close(vit(images), target.encoder(images).detach(), atol=1e-6)


# --------------------------------------------------------------------------------------- promises


def test_the_order_of_kept_patches_changes_nothing():
    _, target = tiny()
    view, keep = torch.rand(4, 3, 16, 16), torch.randperm(16)[:11]
    a, b = (target.eval()(view, k.expand(4, -1)) for k in (keep, keep.sort()[0]))
    close(a.detach(), b.detach(), atol=1e-6)


def test_me_max_pushes_to_equal_use():
    torch.manual_seed(0)
    z, q = torch.randn(64, 8).requires_grad_(), F.normalize(torch.randn(6, 8), dim=1)
    optimizer, first = torch.optim.Adam([z], lr=0.05), None
    for _ in range(200):
        _, me_max, _ = msn.msn_loss(z, z.detach(), q)
        first = first or me_max.item()
        assert me_max.item() > -1e-6
        optimizer.zero_grad()
        me_max.backward()
        optimizer.step()
    assert first > 0.01 and me_max.item() < 1e-3


def test_batch_norm_remembers_no_nan():
    norm = msn.BatchNorm(3)
    norm(torch.full((4, 3), float("nan")))
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


def test_recomputing_changes_nothing():
    flags = "--width 16 --depth 2 --heads 2 --batch 16 --steps 2 --eval none --device cpu"
    flags += " --log-every 1 --workers 0 --no-compile --save-every 1"
    for name in ("plain", "recompute"):
        more = "--recompute" if name == "recompute" else ""
        msn.main(f"{flags} --out {name} {more}".split())
    a, b = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("plain", "recompute"))
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name])
