"""msn.py against the reference implementation's numbers (tests/golden/msn) and against its own promises."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import free_port, on_ranks
from PIL import Image

import common
import msn
from msn import Config, World

GOLDEN = Path(__file__).parent / "golden" / "msn"
TINY = dict(image_size=16, patch=4, focal_size=8, width=16, heads=2, depth=2, head_hidden=20, embedding=12,
            prototypes=10, batch=4, focal_views=3, drop=0.3)  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))
# Analytically these have no gradient (BatchNorm or softmax cancel them): after Adam's steps they hold noise
NOISE = ("norm.bias", "fc.fc1.bias", "fc.fc2.bias", "attn.qkv.bias")


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual, expected = (torch.as_tensor(np.asarray(x)).double() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def tiny(**changes):
    """(model, target) with the weights of the released layout's tiny checkpoint."""
    model, target = msn.build(Config(**TINY | changes))
    path = GOLDEN / "tiny_msn.pth.tar"
    msn.load_weights(model, target, msn.read_checkpoint(path, heads=2), path)
    return model, target


def noise(name):
    return any(name.endswith(n) for n in NOISE) and ".norm" not in name.replace("encoder.norm", "norm")


def official(name):
    """Our parameter's name in the reference's flat layout."""
    return name.removeprefix("network.").removeprefix("encoder.")


def views_of(g):
    return [tensor(g[f"view{i}"]) for i in range(5)]


# ----------------------------------------------------------------------------------------------------------- parity


def test_forward_in_evaluation_mode():
    g = golden("forward")
    _, target = tiny()
    target.eval()
    vit, views = target.encoder, views_of(g)
    with torch.no_grad():
        close(vit(views[0]), g["tokens_target_view"], atol=1e-5)
        close(vit(views[2]), g["tokens_focal_view"], atol=1e-5)
        close(target.class_tokens(views[0]), g["cls_before_head"], atol=1e-5)
        close(torch.cat([target(v) for v in views]), g["embed_eval_list"], atol=1e-5)
        pooled, concat, tokens = msn.encode(vit, views[0])
        close(pooled, g["blocks1"], atol=1e-5)
        close(concat, g["blocks2"], atol=1e-5)
        assert tokens.shape == (4, 16, 16)
        last = vit(views[0], layers=[-2, -1])
        pooled = torch.cat([last[0][:, 0], last[1][:, 0], last[1][:, 1:].mean(1)], dim=1)
        close(pooled, g["lastn2_avgpool"], atol=1e-5)
        keep = tensor(g["blocks1_drop_keep"], torch.long) - 1
        x = vit.embed(views[0], keep.expand(4, -1))
        for block in vit.blocks:
            x = block(x)
        close(x[:, 0], g["blocks1_drop"], atol=1e-5)
        x = vit.blocks[0](vit.embed(views[0]))
        q, k, _ = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(x)).view(4, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
        close((q @ k.mT * 8**-0.5).softmax(-1), g["attn_last"], atol=1e-5)
        for size in (8, 12, 24, 32):
            grid = (size // 4, size // 4)
            table = common.old_interpolate_positions(vit.pos_embed[:, 1:], (4, 4), grid)
            close(torch.cat([vit.pos_embed[:, :1], table], dim=1), g[f"pos_embed_{size}px"], atol=1e-5)


def test_forward_in_training_mode_and_batch_statistics():
    g = golden("forward")
    views = views_of(g)
    _, target = tiny()
    with torch.no_grad():
        close(target.train()(views[0]), g["embed_target_train"], atol=1e-5)
    close(target.fc.bn1.running_mean, g["bn1_running_mean_after_target"], atol=1e-5)
    close(target.fc.bn1.running_var, g["bn1_running_var_after_target"], atol=1e-5)
    for parts in (1, 2):  # --accumulate changes nothing
        model, _ = tiny(accumulate=parts)
        keep = (tensor(g["anchor_keep"], torch.long) - 1).expand(1, 4, -1)
        z, prototypes = model.train()([views[1][None], torch.stack(views[2:])], keep)
        close(z.detach(), g["embed_anchor_train"], atol=1e-5)
        close(prototypes.norm(dim=1).detach(), np.ones(10), atol=1e-6)
        close(model.network.fc.bn1.running_mean, g["bn1_running_mean_after_anchor"], atol=1e-5)
        close(model.network.fc.bn2.running_var, g["bn2_running_var_after_anchor"], atol=1e-5)


def test_positions_of_other_sizes():
    g = golden("pos_embed")
    checked = 0
    for key in (k for k in g.files if k.endswith("_in") and g[k].size):
        patch, old, new = (int(v) for v in key[1:-3].split("_"))
        table, grids = tensor(g[key]), [(side // patch,) * 2 for side in (old, new)]
        found = torch.cat([table[:, :1], common.old_interpolate_positions(table[:, 1:], *grids)], dim=1)
        close(found, g[key[:-3] + "_out"], atol=1e-5)
        checked += 1
    assert checked == 5
    vit = common.OldViT(28, 7, 8, 1, 2, class_token=True, learned_positions=True)
    assert vit(torch.zeros(1, 3, 12, 12)).shape == (1, 2, 8)  # what no patch fits is cut off, as by a convolution


def test_initial_weights():
    g = golden("init")
    config = Config(image_size=224, patch=16, width=192, depth=12, heads=3, head_hidden=2048, embedding=256,
                    init_std=0.02, patch_std=0.0)  # fmt: skip
    _, target = msn.build(config)
    count = sum(p.numel() for p in target.parameters())
    assert count == g["n_params"] and sum(p.numel() for p in target.encoder.parameters()) == g["n_params_trunk"]
    ours = {official(n): p for n, p in target.named_parameters()}
    for name, std, mean, shape in zip(g["names"], g["std"], g["mean"], g["shape"]):
        weight = ours[str(name)]
        assert ",".join(map(str, weight.shape)) == shape
        close(weight.std(), std, rtol=0.25 if name == "cls_token" else 0.05, atol=1e-9)
        close(weight.mean(), mean, atol=0.2 * std + 1e-9)
    model, _ = msn.build(replace(config, depth=1))
    assert 0.95 < model.prototypes.abs().max() * 16 <= 1


@pytest.mark.parametrize("case", ["sinkhorn_T0.25", "plain_T0.25", "plain_T0.5", "smooth_T0.25", "small_norm_T0.25"])
def test_loss_and_gradients(case):
    g = golden("loss")
    anchors, prototypes = (tensor(g[k]).requires_grad_() for k in (f"{case}_anchors", "prototypes"))
    rounds = 3 if case.startswith(("sinkhorn", "smooth")) else 0
    temperature = float(case.split("_T")[1])
    cross_entropy, me_max, assigned = msn.msn_loss(
        anchors, tensor(g[f"{case}_targets_z"]), F.normalize(prototypes, dim=1), 0.1, temperature, rounds,
        float(g[f"{case}_label_smoothing"]),
    )  # fmt: skip
    close(cross_entropy.detach(), g[f"{case}_loss"], atol=1e-5)
    close(me_max.detach(), g[f"{case}_me_max"], atol=1e-5)
    close(assigned, g[f"{case}_target_probs"], atol=1e-5)
    assert len(assigned.argmax(1).unique()) == g[f"{case}_np"]
    close(assigned.amax(1).mean(), g[f"{case}_max_t"], atol=1e-5)
    (cross_entropy + float(g[f"{case}_lambda"]) * me_max).backward()
    close(anchors.grad, g[f"{case}_grad_anchors"], atol=1e-5)
    close(prototypes.grad, g[f"{case}_grad_prototypes"], atol=1e-5)
    if not rounds:  # sharpening is a temperature of 0.1 * T
        h = F.normalize(tensor(g[f"{case}_targets_z"]), dim=1) @ F.normalize(prototypes, dim=1).T
        close(assigned, (h / (0.1 * temperature)).softmax(1).detach(), atol=1e-5)


def test_sinkhorn():
    g = golden("loss")
    log_q = tensor(g["sinkhorn_in"]).log()
    close(msn.sinkhorn(log_q, 3).exp(), g["sinkhorn_out"], atol=1e-5)
    close(msn.sinkhorn(log_q, 1).exp(), g["sinkhorn_out_1itr"], atol=1e-5)
    dead = msn.sinkhorn(torch.tensor([[0.0, -300.0], [-1.0, -300.0]]), 3)  # an unused prototype in float32
    assert dead.isfinite().all()


def on_two_ranks(rank, port, results):
    """The golden two-rank case on gloo: what each rank's loss and gradients are."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    g, found = golden("distributed"), {}
    for name, rounds in (("sinkhorn", 3), ("plain", 0)):
        anchors, prototypes = tensor(g["anchors"][rank]).requires_grad_(), tensor(g["prototypes"]).requires_grad_()
        cross_entropy, me_max, assigned = msn.msn_loss(
            anchors, tensor(g["targets"][rank]), F.normalize(prototypes, dim=1), sinkhorn_iterations=rounds
        )
        (cross_entropy + float(g[f"{name}_lambda"]) * me_max).backward()
        found |= {f"{name}_ce_r{rank}": cross_entropy.item(), f"{name}_me_max_r{rank}": me_max.item()}
        found |= {f"{name}_target_probs_r{rank}": assigned, f"{name}_grad_anchors_r{rank}": anchors.grad}
        found |= {f"{name}_grad_proto_local_r{rank}": prototypes.grad}
    norm, alone = msn.BatchNorm(7), torch.nn.BatchNorm1d(7)
    whole = tensor(g["anchors"])
    x, y = whole[rank].clone().requires_grad_(), whole.flatten(0, 1).clone().requires_grad_()
    out, expected = norm(x), alone(y)
    (out * whole[1 - rank]).sum().backward()
    (expected * whole.flip(0).flatten(0, 1)).sum().mul(0.5).backward()  # DDP takes the mean over ranks
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
        close(np.mean([found[f"{name}_ce_r{rank}"] for rank in range(2)]), g[f"{name}_single_ce"], atol=2e-6)


def test_schedules_and_kept_patches():
    g = golden("schedules")
    for name in ("vits16", "tiny"):
        per_epoch, epochs, warmup, start_lr, lr, final_lr, wd, final_wd = g[f"{name}_cfg"]
        config = Config(warmup=warmup / epochs, lr=lr, lr_start=start_lr, lr_final=final_lr, weight_decay=wd,
                        weight_decay_final=final_wd, momentum=0.996, momentum_final=1.0, sharpen=0.25,
                        sharpen_final=0.1, schedule_scale=1.25)  # fmt: skip
        ours = np.array([msn.schedules(config, int(s), int(per_epoch * epochs)) for s in g[f"{name}_step"]])
        for i, key in enumerate(("lr", "wd", "momentum", "sharpen_025_to_010")):
            np.testing.assert_allclose(ours[:, i], g[f"{name}_{key}"], rtol=1e-12)
    for patches, drop, kept in zip(g["keep_N"], g["keep_drop"], g["keep_T"]):
        assert msn.kept_patches(int(patches), float(drop)) == kept


def test_parameter_groups():
    g = golden("param_groups")
    model, _ = tiny()
    names = {p: official(n) for n, p in model.named_parameters()}
    decayed, undecayed, prototypes = ({names[p] for p in x["params"]} for x in msn.make_optimizer(model).param_groups)
    assert decayed == set(g["decay"]) and undecayed == set(g["no_decay"]) and prototypes == {"prototypes"}
    assert {"cls_token", "pos_embed"} <= decayed


@pytest.mark.parametrize("tag", ["sinkhorn", "plain"])
def test_four_training_steps(tag):
    """Loss, gradients, clipping, schedules, AdamW and EMA together, against four steps of the reference."""
    g, views = golden("train_trace"), views_of(golden("forward"))
    per_epoch, epochs, warmup, start_lr, lr, final_lr, wd, final_wd, clip, weight, rounds = g[f"{tag}_hyper"]
    config = Config(**TINY, warmup=warmup / epochs, lr=lr, lr_start=start_lr, lr_final=final_lr, weight_decay=wd,
                    weight_decay_final=final_wd, momentum=0.996, schedule_scale=1.25, clip=clip, weight=weight,
                    sinkhorn=3 * int(rounds))  # fmt: skip
    model, _ = tiny()
    model.config = config
    target = copy.deepcopy(model.network)
    optimizer, ema = msn.make_optimizer(model), common.OLD_EMA(target, model.network)
    network, qkv = list(model.network.parameters()), [b.attn.qkv.weight for b in model.network.encoder.blocks]
    for step in range(4):
        rate, decay, momentum, sharpen = msn.schedules(config, step, int(per_epoch * epochs))
        np.testing.assert_allclose((rate, decay, momentum), [g[f"{tag}_{k}"][step] for k in ("lr", "wd", "m")], 1e-12)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = rate, decay if group["decay"] else 0.0
        keep = (tensor(g[f"{tag}_keep"][step], torch.long) - 1).expand(1, 4, -1)
        view, anchors = msn.anchors_by_size([torch.stack(views[:2]), torch.stack(views[2:])])
        with torch.no_grad():
            h = target(view)
        loss, parts, assigned = model.objective(*(z := model(anchors, keep))[:1], h, z[1], sharpen)
        loss.backward()
        found = dict(loss=loss, ce=parts["ce"], me_max=parts["me_max"], max_t=assigned.amax(1).mean())
        for key, value in found.items():
            close(value.detach(), g[f"{tag}_{key}"][step], atol=1e-3)
        assert len(assigned.argmax(1).unique()) == g[f"{tag}_np"][step]
        log_p = msn.log_assignments(z[0], z[1])
        close(torch.special.entr(log_p.exp()).sum(1).mean().detach(), g[f"{tag}_entropy"][step], atol=1e-3)
        norms = dict(gnorm=common.old_gradient_norm(network), proto_gnorm=model.prototypes.grad.norm())
        norms |= dict(first_qkv_gnorm=qkv[0].grad.norm(), last_qkv_gnorm=qkv[1].grad.norm())
        for key, value in norms.items():
            close(value, g[f"{tag}_{key}"][step], rtol=1e-3)
        torch.nn.utils.clip_grads_with_norm_(network, clip, norms["gnorm"])
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum)
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
        weights = msn.read_checkpoint(GOLDEN / "tiny_msn_train.pth.tar", heads=2)
        close(weights["prototypes"], model.prototypes.detach(), atol=1e-3)
        for part, module in (("network", model.network), ("target", target)):
            for name, value in module.state_dict().items():
                if not noise(official(name)) and "num_batches" not in name:
                    close(value, weights[part][name], atol=2e-2 if "running" in name else 1e-3)


def test_views():
    g = golden("views")
    image = tensor(g["image"]).permute(2, 0, 1)[None]
    one = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for v in ("v0", "v1", "v2", "v3"):
        box, crop = tensor(g[f"{v}_box_tlhw"]), tensor(g[f"{v}_crop"]).permute(2, 0, 1)[None]
        flip = torch.tensor([bool(g[f"{v}_flip"])])
        found = msn.crop_resize(image, box[None], crop.shape[-1])
        assert (found - crop).abs().max() <= 2
        x = crop.flip(3) if flip else crop
        order, factors = tensor(g[f"{v}_order"], torch.long), tensor(g[f"{v}_factors_bcsh"])
        for operation, expected in zip(order.tolist(), tensor(g[f"{v}_jitter_stages"])):
            expected = expected.permute(2, 0, 1)[None]
            alone = one.clone()
            alone[operation] = factors[operation]
            difference = (msn.colour_jitter(x, alone[None], order[None]) - expected).abs()
            assert difference.max() <= (7 if operation == 3 else 2)
            if operation == 3:
                assert difference.mean() < 0.3
            x = expected
        close(x, g[f"{v}_jitter"].transpose(2, 0, 1)[None])
        grey = torch.tensor([bool(g[f"{v}_gray"])])
        sigma = tensor(g[f"{v}_blur_radius"])[None]
        flipped = crop.flip(3) if flip else crop
        whole = msn.augment(flipped, factors[None], order[None], grey, sigma)
        x = msn.grey_levels(x).expand_as(x) if grey else x
        blurred = tensor(g[f"{v}_blur"]).permute(2, 0, 1)[None]
        assert (msn.blur(x, sigma) - blurred).abs().max() <= 3
        assert (whole - blurred).abs().mean() < 2  # the whole chain, errors adding up
        close(msn.normalize(blurred)[0], g[f"{v}_final"], atol=2e-3)


def test_grey_hue_and_blur_against_pil():
    from PIL import ImageFilter

    random = np.random.default_rng(0)
    image = random.integers(0, 256, (31, 29, 3), dtype=np.uint8)
    x = tensor(image).permute(2, 0, 1)[None]
    np.testing.assert_array_equal(msn.grey_levels(x)[0, 0], np.asarray(Image.fromarray(image).convert("L")))
    for sigma in (0.0, 0.1, 0.7, 1.0, 1.9, 3.1):
        expected = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))).astype(int)
        found = msn.blur(x, torch.tensor([sigma]))[0].permute(1, 2, 0).numpy()
        assert abs(found - expected).max() <= 3, sigma
    hsv = Image.fromarray(image).convert("HSV")
    for turns in (-0.1, 0.03, 0.5):
        h, s, v = (np.asarray(band) for band in hsv.split())
        h = ((h.astype(int) + math.trunc(255 * turns)) % 256).astype(np.uint8)
        expected = np.asarray(Image.merge("HSV", [Image.fromarray(b) for b in (h, s, v)]).convert("RGB")).astype(int)
        difference = abs(msn.shift_hue(x, torch.tensor([turns]))[0].permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 7 and difference.mean() < 0.1


def test_a_batch_is_augmented_as_its_images_one_by_one():
    config = Config(jitter_share=0.7, blur=0.5, grey=0.3)
    drawn = msn.draw_photometric(24, config, common.old_generator(0))
    images = torch.randint(0, 256, (24, 3, 16, 16), generator=common.old_generator(1)).float()
    drawn.pop("flip")
    together = msn.augment(images, **drawn)
    for i in range(24):
        alone = msn.augment(images[i : i + 1], **{k: v[i : i + 1] for k, v in drawn.items()})
        assert torch.equal(alone[0], together[i])
    untouched = (drawn["factors"] == torch.tensor([1.0, 1, 1, 0])).all(1) & ~drawn["grey"] & (drawn["sigma"] == 0)
    assert untouched.any() and torch.equal(together[untouched], images[untouched])


def test_photometric_draws_follow_the_paper():
    drawn = msn.draw_photometric(40000, Config(), common.old_generator(0))
    jittered = (drawn["factors"] != torch.tensor([1.0, 1, 1, 0])).all(1)
    shares = dict(flip=0.5, grey=0.2) | {"sigma": 0.5}
    for key, share in shares.items():
        assert (drawn[key] != 0).float().mean() == pytest.approx(share, abs=0.01)
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.01)
    low, high = drawn["factors"][jittered].amin(0), drawn["factors"][jittered].amax(0)
    close(low, [0.6, 0.6, 0.6, -0.1], atol=2e-3)
    close(high, [1.4, 1.4, 1.4, 0.1], atol=2e-3)
    assert 0.1 <= drawn["sigma"][drawn["sigma"] > 0].min() and drawn["sigma"].max() <= 2.0
    places = torch.stack([(drawn["order"] == op).float().argmax(1).float().mean() for op in range(4)])
    close(places, [1.5] * 4, atol=0.03)


def test_crop_statistics():
    g = golden("views")
    for key in (k for k in g.files if k.startswith("stat_")):
        _, kind, size = key.split("_")
        height, width = map(int, size.split("x"))
        scale = (0.3, 1.0) if kind == "rand" else (0.05, 0.3)
        boxes = msn.random_crops(torch.tensor([[width, height]]).repeat(40000, 1), scale, common.old_generator(key))
        top, left, h, w = boxes.double().unbind(1)
        share, ratio = h * w / (height * width), (w / h).log()
        ours = [share.mean(), *share.quantile(torch.tensor([0.1, 0.5, 0.9]).double()), ratio.mean(), ratio.std()]
        ours += [(top / (height - h).clamp(min=1)).mean(), (left / (width - w).clamp(min=1)).mean()]
        close(torch.stack(ours), g[key], atol=0.02)


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
        assert msn.accuracy(scores, y) / 100 == pytest.approx(float(g[f"lam{ridge}_train_acc"]), abs=1 / 60 + 1e-9)
        found = msn.accuracy(msn.standardise(test_x).double() @ weight.T, test_y) / 100
        for key in (f"lam{ridge}_test_acc", f"lam{ridge}_cyanure_acc_tol1e-3"):
            assert found == pytest.approx(float(g[key]), abs=1 / 200 + 1e-9)


def test_linear_probe_steps():
    g = golden("linear_eval")
    heads = msn.ProbeHeads(16, 5, Config(probe_lrs=(6.4, 1.0), probe_batch=256), torch.device("cpu"))
    names = ("norm.weight", "norm.bias", "linear.weight", "linear.bias")
    for p, name in zip(heads.parameters, names):
        p.data.copy_(tensor(g[f"lin_init_{name}"]))
    for step in range(4):
        rate = common.old_cosine_schedule(step, 4, 1.0, 0.0)
        close(6.4 * rate, g["lin_lrs"][step], rtol=1e-6)
        labels = torch.from_numpy(g["lin_Y"][step])
        losses = heads.step(tensor(g["lin_X"][step]), labels, rate, decay=float(g["lin_wd"]))
        close(losses[0], g["lin_losses"][step], atol=1e-4)
    for p, name in zip(heads.parameters, names):
        close(p[0].detach().squeeze(0), g[f"lin_final_{name}"], atol=1e-4)


# ------------------------------------------------------------------------------------------------------- promises


def test_masks_are_a_function_of_step_and_sample():
    config = Config(image_size=32, patch=4, batch=8, drop=0.3, random_views=2, focal_size=16)
    shared = msn.sample_keep(config, 3, 0, 8)
    assert shared.shape == (2, 8, msn.kept_patches(64, 0.3)) and (shared == shared[:1, :1]).all()
    each = msn.sample_keep(replace(config, mask_per="image"), 3, 0, 8)
    assert each.shape == shared.shape and not torch.equal(each[0, 0], each[0, 1])
    for c in (config, replace(config, mask_per="image")):
        whole = msn.sample_keep(c, 3, 0, 8)
        assert torch.equal(whole[:, 4:], msn.sample_keep(c, 3, 4, 8))
        assert not torch.equal(whole, msn.sample_keep(c, 4, 0, 8))
        assert all(len(set(row)) == 44 for row in whole.flatten(0, 1).tolist())
    counts = torch.stack([msn.sample_keep(config, s, 0, 1)[0, 0].bincount(minlength=64) for s in range(2000)]).sum(0)
    assert (counts.float() / 2000 - 44 / 64).abs().max() < 0.05
    assert len(msn.sample_keep(replace(config, focal_size=32), 0, 0, 8)) == 2 + 2  # one group, all of it masked


def test_the_order_of_kept_tokens_changes_nothing():
    model, target = tiny()
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
    _, me_max, _ = msn.msn_loss(q[:1].repeat(8, 1), q[:1].repeat(4, 1), q, temperature=0.01)
    assert me_max.item() == pytest.approx(math.log(6), abs=1e-3)


def test_batch_norm_remembers_no_nan():
    norm = msn.BatchNorm(3)
    norm(torch.full((4, 3), float("nan")))
    assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()


def test_anchors_of_one_size_are_one_group():
    same = msn.anchors_by_size([torch.zeros(2, 4, 3, 8, 8), torch.zeros(3, 4, 3, 8, 8)])
    assert same[0].shape == (4, 3, 8, 8) and [a.shape[0] for a in same[1]] == [4]
    apart = msn.anchors_by_size([torch.zeros(2, 4, 3, 8, 8), torch.zeros(3, 4, 3, 4, 4)])
    assert [tuple(a.shape[::4]) for a in apart[1]] == [(1, 8), (3, 4)]


def test_the_encoder_runs_once_per_view_size(monkeypatch):
    model, _ = tiny()
    sizes, forward = [], common.OldViT.forward
    monkeypatch.setattr(common.OldViT, "forward", lambda self, x, *a: sizes.append(tuple(x.shape)) or forward(self, x, *a))
    views = [torch.rand(2, 4, 3, 16, 16), torch.rand(3, 4, 3, 8, 8)]
    _, anchors = msn.anchors_by_size(views)
    model(anchors, msn.sample_keep(Config(**TINY), 0, 0, 4))
    assert sizes == [(4, 3, 16, 16), (12, 3, 8, 8)]
