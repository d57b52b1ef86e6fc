"""msn.py against the reference implementation's numbers (golden/msn), and its own promises."""

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, Golden, close, compare, count, free_port, golden_tensors, groups_of
from helpers import networks, on_ranks
from torch import nn

import common
import msn
from msn import Config

OFFICIAL = GOLDEN / "msn" / "tiny_msn.pth.tar"
golden = functools.partial(golden_tensors, "msn")
# Analytically these have no gradient: after Adam's steps they hold noise
NOISE = ("fc.fc1.bias", "fc.fc2.bias", "attn.qkv.bias", "norm.bias")


def official(name):
    """Return our parameter's name in the reference's flat layout."""
    return name.removeprefix("network.").removeprefix("encoder.")


def forward_inputs():
    """Return (golden file, target view, anchor view, focal views [F*B, 3, s, s])."""
    g = golden("forward")
    return g, g.view0, g.view1, torch.cat([g.view2, g.view3, g.view4])


def keep_of(indices):
    """Return golden indices, which count the class token, as `keep` of four images."""
    return (indices - 1).expand(4, -1)


# ----------------------------------------------------------------------------------------- parity


def test_forward_in_evaluation_mode():
    g, view, anchor, focal = forward_inputs()
    *_, target = networks(msn, OFFICIAL)
    target.eval()
    vit = msn.load_encoder(OFFICIAL, heads=2)
    first, last = vit(view, layers=2)
    x = vit.blocks[0](vit.embed(view))
    block = vit.blocks[1]
    qkv = block.attn.qkv(block.norm1(x))
    q, k, _ = qkv.view(4, 17, 3, 2, 8).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    encoded = msn.encode(vit, view)
    pooled = [first[:, 0], last[:, 0], last[:, 1:].mean(1)]
    compare(
        g,
        atol=1e-5,
        tokens_target_view=last,
        tokens_focal_view=vit(focal[:4]),
        cls_before_head=last[:, 0],
        embed_eval_list=torch.cat([target(v) for v in (view, anchor, focal)]),
        blocks1=encoded,
        blocks2=torch.cat([x[:, 0], encoded], dim=1),
        blocks1_drop=msn.encode(vit, view, keep_of(g.blocks1_drop_keep)),
        lastn2_avgpool=torch.cat(pooled, dim=1),
        attn_last=(scores / 8**0.5).softmax(-1),
    )
    for size in (8, 12, 24, 32):
        table = common.interpolate_positions(vit.pos_embed, [size // 4] * 2)
        compare(g, atol=1e-5, **{f"pos_embed_{size}px": table})


def test_forward_in_training_mode_and_batch_statistics():
    g, view, anchor, focal = forward_inputs()
    _, model, target = networks(msn, OFFICIAL)
    targets = target(view)
    anchors, _ = model(anchor, keep_of(g.anchor_keep), focal)
    compare(
        g,
        atol=1e-5,
        embed_target_train=targets,
        embed_anchor_train=anchors,
        bn1_running_mean_after_target=target.fc.bn1.running_mean,
        bn1_running_var_after_target=target.fc.bn1.running_var,
        bn1_running_mean_after_anchor=model.network.fc.bn1.running_mean,
        bn2_running_var_after_anchor=model.network.fc.bn2.running_var,
    )
    target(view * float("nan"))
    assert target.fc.bn1.running_var.isfinite().all()


def test_positions_of_other_sizes():
    g = golden("pos_embed")
    for case in ("p16_224_96", "p8_224_96", "p7_224_96", "p4_224_96", "p16_224_384"):
        patch, _, size = map(int, case[1:].split("_"))
        grid = [size // patch] * 2
        found = common.interpolate_positions(g[f"{case}_in"], grid)
        compare(g, case, atol=1e-5, _out=found)


def test_initial_weights():
    g = golden("init")
    config = replace(Config(**msn.PRESETS["vit_s16_in1k"]), width=192, heads=3)
    model, target = msn.build(config)
    compare(g, n_params=count(target), n_params_trunk=count(target.encoder))
    ours = {official(n): p for n, p in target.named_parameters()}
    columns = (g.names, g.std, g.mean, g.shape)
    for name, std, mean, shape in zip(*columns, strict=True):
        assert ",".join(map(str, ours[name].shape)) == shape
        close(ours[name].std(), std, rtol=0.25 if name == "cls_token" else 0.05, atol=1e-9)
        close(ours[name].mean(), mean, atol=0.2 * std + 1e-9)
    assert 0.95 < model.prototypes.abs().max() * 16 <= 1


def loss_and_gradients(z, h, prototypes, weight, *options):
    """Return what `msn_loss` does, and the gradients of anchors and prototypes."""
    inputs = [x.clone().requires_grad_() for x in (z, prototypes)]
    found = msn.msn_loss(inputs[0], h, F.normalize(inputs[1], dim=1), *options)
    return *found, *torch.autograd.grad(found[0] + weight * found[1], inputs)


CASES = {  # rounds of Sinkhorn, sharpening
    "sinkhorn_T0.25": (3, 0.25),
    "plain_T0.25": (0, 0.25),
    "plain_T0.5": (0, 0.5),
    "small_norm_T0.25": (0, 0.25),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case):
    g = golden("loss")
    inputs = g[f"{case}_anchors"], g[f"{case}_targets_z"], g.prototypes, g[f"{case}_lambda"]
    ce, me_max, assigned, *gradients = loss_and_gradients(*inputs, *CASES[case])
    compare(
        g,
        f"{case}_",
        atol=1e-5,
        loss=ce,
        me_max=me_max,
        target_probs=assigned,
        np=msn.count_used(assigned),
        max_t=assigned.amax(1).mean(),
        grad_anchors=gradients[0],
        grad_prototypes=gradients[1],
    )


def test_sinkhorn():
    g = golden("loss")
    for name, rounds in {"out": 3, "out_1itr": 1}.items():
        found = msn.sinkhorn(g.sinkhorn_in.log(), rounds).exp()
        compare(g, "sinkhorn_", atol=1e-5, **{name: found})
    unused = torch.tensor([[0.0, -300.0], [-1.0, -300.0]])  # an unused prototype in float32
    assert msn.sinkhorn(unused, 3).isfinite().all()


def on_two_ranks(rank, port):
    """Compare the golden two-rank case on gloo."""
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    g = golden("distributed")
    for name, rounds in {"sinkhorn": 3, "plain": 0}.items():
        inputs = g.anchors[rank], g.targets[rank], g.prototypes, g[f"{name}_lambda"]
        ce, me_max, assigned, *gradients = loss_and_gradients(*inputs, rounds)
        mean = common.mean_over_ranks(gradients[1])  # ours: the true gradient
        found = {
            f"ce_r{rank}": ce,
            f"me_max_r{rank}": me_max,
            f"target_probs_r{rank}": assigned,
            f"grad_anchors_r{rank}": gradients[0],
            f"grad_proto_local_r{rank}": gradients[1],
            "grad_proto_summed": 2 * mean,
            "single_grad_proto": mean,
            "single_ce": common.mean_over_ranks(ce),
        }
        compare(g, f"{name}_", atol=2e-6, **found)


def test_loss_on_two_ranks():
    on_ranks(on_two_ranks, free_port(), ranks=2)


def schedule_config(numbers, module=msn):
    """Return (Config, steps) of golden numbers: E, epochs, warmup, lrs, weight decays."""
    per_epoch, epochs, warmup, *rates = numbers[:8]
    names = ("lr_start", "lr", "lr_final", "weight_decay", "weight_decay_final")
    config = module.Config(**dict(zip(names, rates, strict=True)), warmup=warmup / epochs)
    return replace(config, schedule_scale=1.25, momentum=0.996), int(per_epoch * epochs)


def test_schedules_and_kept_patches():
    g = golden("schedules")
    for name in ("vits16", "tiny"):
        config, steps = schedule_config(g[f"{name}_cfg"].tolist())
        for i, step in enumerate(g[f"{name}_step"].tolist()):
            lr, wd, momentum = msn.schedules(config, step, steps)
            compare(g, f"{name}_", at=i, rtol=1e-12, lr=lr, wd=wd, momentum=momentum)
    kept = map(msn.kept_patches, g.keep_N.tolist(), g.keep_drop.tolist())
    compare(g, keep_T=[*kept])


def test_parameter_groups():
    g = golden("param_groups")
    _, model, _ = networks(msn, OFFICIAL)
    optimizer = msn.make_optimizer(model)
    decayed, undecayed, prototypes = groups_of(optimizer, model)
    assert {official(name) for name in decayed} == set(g.decay)
    assert {official(name) for name in undecayed} == set(g.no_decay)
    assert prototypes == {"prototypes"} and not optimizer.param_groups[2]["decay"]


def train_steps(module, g, tag, loss_of):
    """Take four reference steps; yield (rates, model, target) of each before its update.

    loss_of(z, h, prototypes) returns the loss and what else the file has of a step.
    """
    _, view, anchor, focal = forward_inputs()
    hyper = g[f"{tag}hyper"].tolist()
    config, steps = schedule_config(hyper, module)
    _, model, _ = networks(module, OFFICIAL)
    target = copy.deepcopy(model.network)
    optimizer = module.make_optimizer(model)
    ema = common.EMA(target, model.network)
    for step in range(4):
        lr, wd, momentum = module.schedules(config, step, steps)
        common.set_rates(optimizer, lr, wd)
        z, prototypes = model(anchor, keep_of(g[f"{tag}keep"][step]), focal)
        loss, found = loss_of(z, target(view), prototypes)
        loss.backward()
        compare(g, tag, at=step, atol=1e-3, loss=loss, **found)
        yield {"lr": lr, "wd": wd, "m": momentum}, model, target
        norm = nn.utils.clip_grad_norm_(model.network.parameters(), hyper[8])
        compare(g, tag, at=step, rtol=1e-3, gnorm=norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()))


def compare_parameters(g, key, module, reduce=torch.norm, **tolerance):
    """Compare norms, or sums, of all parameters but those that hold noise."""
    ours = {official(name): reduce(p) for name, p in module.named_parameters()}
    rows = [i for i, name in enumerate(g.param_names) if not name.endswith(NOISE)]
    found = torch.stack([ours[g.param_names[i]] for i in rows])
    close(found, g[key][rows], **tolerance)


GRADIENTS = {  # whose norms the file has
    "first_qkv_gnorm": "network.encoder.blocks.0.attn.qkv.weight",
    "last_qkv_gnorm": "network.encoder.blocks.1.attn.qkv.weight",
    "proto_gnorm": "prototypes",
}


@pytest.mark.parametrize("tag", ["sinkhorn_", "plain_"])
def test_four_training_steps(tag):
    """Loss, gradients, clipping, schedules, AdamW and EMA together, against the reference."""
    g = golden("train_trace")
    _, weight, rounds = g[f"{tag}hyper"][8:].tolist()

    def loss_of(z, h, prototypes):
        cross_entropy, me_max, assigned = msn.msn_loss(z, h, prototypes, 3 * int(rounds))
        p = msn.log_assignments(z, prototypes).exp()
        found = {
            "ce": cross_entropy,
            "me_max": me_max,
            "max_t": assigned.amax(1).mean(),
            "np": msn.count_used(assigned),
            "entropy": torch.special.entr(p).sum(1).mean(),
        }
        return cross_entropy + weight * me_max, found

    steps = train_steps(msn, g, tag, loss_of)
    for step, (rates, model, target) in enumerate(steps):  # noqa: B007
        compare(g, tag, at=step, rtol=1e-12, **rates)
        found = {key: model.get_parameter(name).grad.norm() for key, name in GRADIENTS.items()}
        compare(g, tag, at=step, rtol=1e-3, **found)
    compare(g, tag, atol=1e-4, prototypes_final=model.prototypes)
    compare_parameters(g, f"{tag}encoder_norms", model.network, rtol=1e-3)
    compare_parameters(g, f"{tag}encoder_sums", model.network, torch.sum, atol=1e-3)
    compare_parameters(g, f"{tag}target_norms", target, rtol=1e-3)
    if tag == "sinkhorn_":  # the trainer's own file, written after these steps
        _, *trained = networks(msn, GOLDEN / "msn" / "tiny_msn_train.pth.tar")
        for ours, theirs in zip((model, target), trained, strict=True):
            expected = theirs.state_dict()
            for name, value in ours.state_dict().items():
                if not name.endswith((*NOISE, "num_batches_tracked")):
                    close(value, expected[name], atol=2e-2 if "running" in name else 1e-3)


# ------------------------------------------------------------------------------------------ views


def chw(array):
    """Return a golden image [H, W, 3] as a batch of one, float [1, 3, H, W]."""
    return array.permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("v", ["v0_", "v1_", "v2_", "v3_"])
def test_views(v):
    """Crop, jitter, grey and blur, each on its stored input, and the whole chain."""
    g = Golden({name.removeprefix(v): value for name, value in golden("views").items()})
    crop = chw(g.crop)
    split = common.in_memory(g.image[None].numpy(), [0], ["any"], "train")
    box = g.box_tlhw.tolist()
    (part,) = split.read(0, lambda *_: [box], [crop.shape[-1]])
    # the reference crops before it resizes, so at the edges it sees nothing beyond the crop
    assert (part - crop).abs().mean() < 3
    amounts = torch.zeros(1, 7)
    amounts[0, 1:5] = g.factors_bcsh
    amounts[0, 6] = g.blur_radius
    order = (1 + g.order).tolist()
    x = crop.flip(3) if g.flip else crop
    for number, stage in zip(order, map(chw, g.jitter_stages), strict=True):
        found = msn.OPERATIONS[number](x, amounts[:, number])
        close(found, stage, atol=7 if number == 4 else 2)  # 4 is the hue
        assert (found - stage).abs().mean() < 0.3
        x = stage
    x = msn.grey(chw(g.jitter), None) if g.gray else chw(g.jitter)
    blurred = chw(g.blur)
    close(msn.blur(x, amounts[:, 6]), blurred, atol=3)
    compare(g, atol=2e-3, final=common.normalize(blurred)[0])
    # in a batch, each image in its own order
    orders = torch.full((2, 7), -1)
    mirror = 0 if g.flip else -1
    orders[0] = torch.tensor([mirror, *order, 5 if g.gray else -1, 6])
    batch = crop.repeat(2, 1, 1, 1)
    whole, untouched = msn.augment(batch, orders, amounts.repeat(2, 1))
    assert (whole - blurred).abs().mean() < 2  # errors add up
    assert torch.equal(untouched, crop[0])


def test_photometric_draws_follow_the_paper():
    u = torch.rand(40000, 15, generator=common.generator(0))
    order, amounts = msn.draw_augmentation(u, 0.5)
    shares = [(order == number).any(1).float().mean() for number in range(7)]
    close(shares, [0.5, 0.8, 0.8, 0.8, 0.8, 0.2, 0.5], atol=0.01)
    close(amounts.amin(0), [0.0, 0.6, 0.6, 0.6, -0.1, 0.0, 0.1], atol=2e-3)
    close(amounts.amax(0), [0.0, 1.4, 1.4, 1.4, 0.1, 0.0, 2.0], atol=2e-3)
    assert len(order[:, 1:5].unique(dim=0)) == 1 + 24  # no jitter, or in any order


def test_crop_statistics():
    g = golden("views")
    for key in [key for key in g if key.startswith("stat_")]:
        _, kind, size = key.split("_")
        height, width = map(int, size.split("x"))
        scale = (0.3, 1.0) if kind == "rand" else (0.05, 0.3)
        random = common.generator(key)
        boxes = [common.random_crop(width, height, scale, random) for _ in range(8000)]
        top, left, h, w = np.array(boxes).T
        share = h * w / (height * width)
        ratio = np.log(w / h)
        quantiles = np.quantile(share, (0.1, 0.5, 0.9))
        found = [share.mean(), *quantiles, ratio.mean(), ratio.std()]
        for start, room in ((top, height - h), (left, width - w)):
            found.append((start / room.clip(1)).mean())
        close(found, g[key], atol=0.02)


def test_kept_patches_are_drawn_for_the_batch_or_for_each_image():
    shared = msn.sample_keep(Config(), 3)
    assert shared.shape == (128, 25) and (shared == shared[0]).all()
    each = msn.sample_keep(Config(mask_per="image"), 3)
    counts = F.one_hot(each, 36).sum(1)  # [B, 36]
    assert counts.max() == 1 and counts.sum(0).min() > 0.4 * 128


# ------------------------------------------------------------------------------------- evaluation


def test_logistic_regression_finds_the_optimum():
    g = golden("logistic")
    x, test_x = map(msn.standardise, (g.X, g.Xtest))
    compare(g, atol=1e-6, X_pre=x, Xtest_pre=test_x)
    for ridge in (0.0025, 0.075, 1.0):
        weight = msn.logistic_regression(x, g.y, 6, ridge)
        scores = x.double() @ weight.T
        penalty = ridge / (2 * len(x)) * weight.square().sum()
        compare(g, f"lam{ridge}_", atol=1e-6, objective=F.cross_entropy(scores, g.y) + penalty)
        train = common.top1(scores, g.y) / 100
        test = common.top1(test_x.double() @ weight.T, g.ytest) / 100
        compare(g, f"lam{ridge}_", atol=1 / 60 + 1e-6, train_acc=train)
        found = {"test_acc": test, "cyanure_acc_tol1e-3": test}
        compare(g, f"lam{ridge}_", atol=1 / 200 + 1e-6, **found)


def test_linear_probe_steps():
    g = golden("linear_eval")
    head = nn.Sequential()
    head.norm = nn.LayerNorm(16)
    head.unit = msn.L2Norm()
    head.linear = nn.Linear(16, 5)
    parameters = dict(head.named_parameters())
    groups = []
    for name, parameter in parameters.items():
        parameter.data = g[f"lin_init_{name}"]
        decay = g.lin_wd.item() if name == "linear.weight" else 0.0
        groups.append({"params": [parameter], "lr": 6.4, "weight_decay": decay})
    optimizer = msn.SGD(groups, steps=4)
    for step in range(4):
        rate = 6.4 * common.cosine_schedule(step, 4, 1.0, 0.0)
        loss = F.cross_entropy(head(g.lin_X[step]), g.lin_Y[step])
        compare(g, "lin_", at=step, rtol=1e-6, lrs=rate)
        compare(g, "lin_", at=step, atol=1e-4, losses=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    compare(g, "lin_final_", atol=1e-4, **parameters)


def test_labelled_subsets(tmp_path):
    split = common.open_split("textures", "val")  # 200 images of each class
    (tmp_path / "list.txt").write_text("\n".join(split.names[5:7]))
    (listed,) = msn.labelled_subsets(split, tmp_path / "list.txt")["1 %"]
    assert listed.names == split.names[5:7]
    for name, draws in msn.labelled_subsets(split, "").items():
        each = {"1-shot": 1, "2-shot": 2, "5-shot": 5, "1 %": 2}[name]
        assert all(few.labels.bincount().tolist() == [each] * 10 for few in draws)
        assert draws[0].names != draws[1].names


def test_random_crops_of_the_probe():
    split = common.open_split("textures", "val")

    def crops(epoch):
        drawn = msn.RandomCrops(**vars(split), key=(0, "probe", epoch))
        return common.centre_crops(drawn, 16, [*range(9)])[1]

    first = crops(0)
    assert torch.equal(first, crops(0)) and not torch.equal(first, crops(1))


# ---------------------------------------------------------------------------------------- weights


def test_larger_images_and_the_hub():
    larger = msn.load_encoder(OFFICIAL, image_size=32, heads=2)
    assert larger.pos_embed.shape == (1, 65, 16)
    g = golden_tensors("hub/msn", "expected")
    vit = msn.load_encoder(GOLDEN / "hub" / "msn" / "model.safetensors", heads=2)
    compare(g, atol=1e-5, tokens=vit(g.images))
