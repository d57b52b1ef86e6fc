"""dinov2.py against the reference's numbers (golden/dinov2), and its own promises.

What all scripts promise is tested in test_runs.py.
"""

import functools
import itertools
import random
import re
from pathlib import Path

import helpers
import numpy as np
import pytest
import reference_dinov2 as reference
import torch
from helpers import GOLDEN, count, golden_tensors, log_rows, norms, photographs, run_several, words
from PIL import Image
from test_runs import SCRIPTS, here, refused

import common
import dinov2
from dinov2 import Config

FILES = GOLDEN / "dinov2"
MLP = FILES / "vit_mlp_pretrain.pth"
SWIGLU = FILES / "vit_reg4_swiglu_pretrain.pth"
SCRIPT = SCRIPTS["dinov2"]
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "dinov2")
close = functools.partial(helpers.close, atol=1e-5, rtol=1e-4)
compare = functools.partial(helpers.compare, atol=1e-5, rtol=1e-4)


def load_encoder(path, heads):
    return dinov2.load_teacher(path, heads).encoder


def preset(name, **fields):
    return Config(**dinov2.PRESETS[name] | fields)


def rows(table):
    """Return the words of each line."""
    return [line.split() for line in table.strip().splitlines()]


def seeded(seed):
    return torch.Generator().manual_seed(int(seed))


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name, path, heads", [("mlp", MLP, 3), ("reg4_swiglu", SWIGLU, 2)])
def test_encoder(name, path, heads):
    """Also with masks, at other sizes, of several layers, before the norm; and its gradients."""
    encoder = load_encoder(path, heads).requires_grad_()
    g = golden(f"vit_forward_{name}")
    first = 1 + encoder.registers
    for prefix, masks in (("", None), ("masked_", g.masks)):
        cls, registers, patches = encoder(g.x, masks).tensor_split([1, first], dim=1)
        found = {"clstoken": cls[:, 0], "regtokens": registers, "patchtokens": patches}
        compare(g, f"{prefix}x_norm_", **found)
    loss = cls.square().sum() + patches.sin().sum()
    loss.backward()
    compare(g, atol=2e-5, grad_norms=norms(encoder, g.grad_names, True))
    compare(g, grad_loss=loss, list_cls_global=cls[:, 0])
    found = {"default_forward": encoder(g.x), "list_cls_local": encoder(g.list_local_x)}
    compare(g, **{name: tokens[:, 0] for name, tokens in found.items()})
    shapes = [str(tuple(encoder.get_parameter(name).shape)) for name in g.grad_names]
    assert shapes == g.param_shapes
    for size in ("nonsq_", "small_", "big_"):
        tokens = encoder(g[f"{size}x"])
        patches = tokens[:, first:]
        compare(g, size, cls=tokens[:, 0], patch_mean=patches.mean(1))
        compare(g, size, patch_first4=patches[:, :4], patch_last4=patches[:, -4:])
    layers = torch.stack(encoder(g.x, layers=2))
    compare(g, il2_patch=layers[:, :1, first:], il2_cls=layers[:, :, 0])
    encoder.norm = torch.nn.Identity()
    compare(g, masked_x_prenorm=encoder(g.x, g.masks))
    layers = torch.stack(encoder(g.x[:1], layers=len(encoder.blocks)))
    close(layers[[0, -1], :, first:].mT, g.il_list_nonorm_reshape.flatten(3))


def test_linear_probe_inputs_and_released_heads():
    encoded = dinov2.encode(load_encoder(MLP, 3), golden("vit_forward_mlp").x)  # [B, 5, D]
    g = golden("linear_input")
    compare(g, n1_avgpool0=encoded[:, -1], n4_avgpool0=encoded[:, 1:].flatten(1))
    for inputs in (g.n1_avgpool1, g.n4_avgpool1):
        width = inputs.shape[1]
        torch.save({"weight": torch.eye(width), "bias": torch.ones(width)}, "head.pth")
        close(dinov2.head_scores("head.pth", encoded), inputs + 1)


def test_stochastic_depth():
    g = golden("stochastic_depth")
    for i in range(3):
        (kept,) = dinov2.draw_kept(g[f"ratio_{i}"], 1, [7], seeded(g[f"seed_{i}"]))
        kept = kept[0, 0]
        close(kept, g[f"perm_{i}"][: len(kept)])
        found = dinov2.add_branch(g.x, lambda x: (x @ g.W).tanh(), kept)
        compare(g, **{f"y_{i}": found})
    encoder = load_encoder(MLP, 3)
    kept = dinov2.draw_kept(0.3, 4, [5], seeded(g.train_seed))[0]
    compare(g, train_cls=encoder(g.train_x, kept=kept)[:, 0])
    kept, local = dinov2.draw_kept(0.3, 4, [5, 6], seeded(g.train_list_seed))
    compare(g, train_list_cls_global=encoder(g.train_x, kept=kept)[:, 0])
    compare(g, train_list_cls_local=encoder(g.train_x_local, kept=local)[:, 0])


def test_positions_swiglu_and_head():
    g = golden("pos_embed")
    for i in range(5):
        table = (g[f"pe_{i}"], g[f"hw_{i}"].tolist()[1:])
        found = {"off01": dinov2.position_table(*table), "off0": dinov2.position_table(*table, 0.0)}
        found["off0_aa"] = dinov2.position_table(*table, 0.0, antialias=True)
        compare(g, f"out_{i}_", rtol=0.0, **found)
    g = golden("swiglu_sizes")
    layers = [dinov2.SwiGLU(width, 4 * width) for width in g.dim.tolist()]
    compare(g, hidden=[layer.w3.in_features for layer in layers])
    g = golden("dino_head")
    head = dinov2.Head(12, 20, 8, 24)
    head.load_state_dict(torch.load(FILES / "dino_head.pth", weights_only=True))
    y = head(g.x.requires_grad_())
    y.square().sum().backward()
    compare(g, y=y, x_grad=g.x.grad, grad_norms=norms(head, g.names, True))


def test_losses():
    g = golden("losses")
    found = {f"T{t}": dinov2.sinkhorn(g.sk_in, t) for t in (0.04, 0.07)}
    found["T0.07_iter1"] = dinov2.sinkhorn(g.sk_in, 0.07, 1)
    compare(g, "sk_out_", **found)
    _, weights = dinov2.masked_tokens(g.ibot_masks)
    targets = dinov2.sinkhorn(g.ibot_teacher_logits, 0.06)
    compare(g, ibot_masks_weight=weights, ibot_sk_T006=targets)
    for x in (g.dino_student, g.ibot_student, g.koleo_x):
        x.requires_grad_()
    both = (g.dino_teacher_logits / 0.07).softmax(-1).sum(0)
    dino = dinov2.cross_entropy(g.dino_student, both).sum(0).mean()
    ibot = (dinov2.cross_entropy(g.ibot_student, targets) * weights).sum() / len(g.ibot_masks)
    koleo = dinov2.koleo_loss(g.koleo_x, len(g.koleo_x))
    (dino + ibot + koleo).backward()
    compare(g, dino_loss=dino, ibot_loss=ibot, koleo_loss=koleo, koleo_grad=g.koleo_x.grad)
    compare(g, dino_grad=g.dino_student.grad, ibot_grad=g.ibot_student.grad)
    x = torch.randn(4, 3).repeat(2, 1).requires_grad_()
    loss = dinov2.koleo_loss(x, 8)
    loss.backward()
    assert loss == 0 and x.grad.isfinite().all(), "equal images"


def test_softmax_centering_lags_by_a_step():
    g = golden("losses")
    for i in range(3):
        dino = (g.center_states[i : i + 2], g.center_in[i], g.center_out[i])
        ibot = [g[f"ibot_center_{way}_{i}"] for way in ("in", "out")]
        for states, logits, expected in (dino, (g.ibot_center_states[i : i + 2, None], *ibot)):
            targets, found = dinov2.softmax_centering(logits, states[0], 0.05)
            close(targets, expected)
            close(found, states[1])
    # a rank may have no masked patches
    targets, found = dinov2.softmax_centering(logits[:0], states[0], 0.1)
    assert targets.shape == dinov2.sinkhorn(logits[:0], 0.1).shape == (0, 18)
    close(found, 0.9 * states[0])


def test_masks_are_the_reference_masks():
    g = golden("masks")
    for size, patch, largest in g.maxpatch_table.tolist():
        assert dinov2.largest_block(size, patch) == largest
    rng = random.Random(int(g.seed))
    compare(g, masks_seeded=reference.draw_blocks(g.seeded_targets.tolist(), rng))
    rng = random.Random(int(g.seed) + 1)
    columns = (g.targets.tolist(), g.stats_mean_std_min_max_fracexact, g.pos_marginal)
    for target, stats, marginal in zip(*columns, strict=True):
        masks = reference.draw_blocks([target] * 4000, rng)
        n = masks.sum((1, 2))
        found = [n.mean(), n.std(), n.min(), n.max()]
        close([*found, (n == target).mean()], stats, rtol=1e-9)
        close(masks.mean(0), marginal)
    masks = reference.draw_masks(random.Random(int(g.col_seed)))
    places, weights = dinov2.masked_tokens(masks)
    compare(g, "col_", masks=masks, idx=places, w=weights, n=[len(places)])
    assert len(places) <= g.col_upper
    rng = random.Random(int(g.col_seed) + 1)
    counts = [reference.draw_masks(rng).sum(1).sort().values for _ in range(300)]
    counts = torch.stack(counts).double()
    std, mean = torch.std_mean(counts.sum(1), correction=0)
    compare(g, "col_stats_", total_mean_std=[mean, std], sorted_mean=counts.mean(0))


def test_masks_of_a_step():
    """Half of the crops are masked, by shares that are stratified over the batch."""
    config = Config(batch=32, image_size=48, patch=4)
    masks, others = (dinov2.sample_masks(config, step, range(32)) for step in (3, 4))
    assert not torch.equal(masks, others)
    none, shares = masks.double().mean(1).sort().values.chunk(2)
    assert not none.any()
    drawn = 0.1 + 0.4 * (torch.arange(32) + 0.5) / 32
    close(shares, drawn - 0.02, atol=0.03)  # the last block may not fit


def test_schedules():
    g = golden("schedules")
    tiny = {"warmup": 2 / 6, "temp_warmup": 3 / 6, "freeze_last": 1 / 6}
    configs = {name: preset(name) for name in ("vitl16_short", "vitl14")}
    configs["tiny"] = Config(steps=30, lr=0.002, **tiny)
    for name, config in configs.items():
        steps = [*g[f"{name}_it"].tolist(), round(config.warmup * config.steps)]
        *rows, top = (dinov2.schedules(config, step, config.steps) for step in steps)
        found = {key: [row[key] for row in rows] for key in top}
        found["wd"] = found.pop("weight_decay")
        found.update(T=config.steps, peak_lr=top["lr"])
        compare(g, f"{name}_", atol=1e-18, rtol=1e-12, **found)


def test_parameter_groups():
    g = golden("param_groups")
    for network in ("A_d09", "B_d09", "B_d1", "head_d09", "chunked4x2_d09"):
        depth = 2 if network[0] == "B" else 4
        decay = 1.0 if network == "B_d1" else 0.9
        names = g[f"{network}_p02_names"]
        rules = [dinov2.parameter_rule(name, depth, decay) for name in names]
        scales, decays, last = zip(*rules, strict=True)
        found = {"lr_mult": scales, "wd_mult": decays, "last": last}
        compare(g, f"{network}_p02_", atol=1e-12, rtol=0.0, nfused=len(set(rules)), **found)


SSL = "--image-size 16 --local-size 8 --patch 4 --width 12 --depth 2 --heads 2 --head-hidden 20 "
SSL += "--bottleneck 8 --prototypes 24 --ibot-hidden 12 --ibot-bottleneck 6 --ibot-prototypes 18 "
SSL += "--layer-scale 1 --lr-decay 0.9 --batch 3 --koleo-group 3 "
STEPS = {"sk_sep": "--registers 2", "center_shared": "--centering softmax --no-separate-heads"}


@pytest.mark.parametrize("name", STEPS)
def test_two_training_steps(name):
    """Forward, all losses, clipping, AdamW and EMA together against two steps of the reference."""
    g = golden(f"ssl_step_{name}")
    inputs = golden("ssl_inputs")
    lr, decay, last_lr, momentum, temperature, clip = g.hyper_lr_wd_lastlr_mom_temp_clip.tolist()
    flags = words([SSL, STEPS[name]])
    config, _ = common.parse_config(Config, dinov2.PRESETS, dinov2.DATA_PRESETS, flags)
    student, teacher = dinov2.build(config)
    for network in (student, teacher):  # the reference interpolates so, whatever the registers
        network.encoder.offset = 0.1
        network.encoder.antialias = False
    saved = torch.load(FILES / "ssl_student.pth", weights_only=True)["student"]
    state = {name.replace("backbone.", "encoder."): saved[name] for name in g.names}
    student.load_state_dict(state)
    teacher.load_state_dict({name: 0.9 * value + 0.01 for name, value in state.items()})
    assert [name for name, _ in student.named_children()] == ["encoder", *g.modules[1:]]
    optimizer = dinov2.make_optimizer(student, config)
    ema = common.EMA(teacher, student)
    dinov2.set_rates(optimizer, {"lr": lr, "last_layer_lr": last_lr, "weight_decay": decay})
    centres = torch.zeros(2, 1)  # of both losses, of any number of prototypes
    crops = inputs["global"]
    for step in range(2):
        masks = inputs[f"masks{step}"]
        places, weights = dinov2.masked_tokens(masks)
        assert len(places) <= inputs[f"upperbound{step}"] and masks.shape[1] == g.ntok
        with torch.no_grad():
            _, logits, _, patch_logits = teacher(crops, places)
        logits = (logits, patch_logits)
        *targets, centres = dinov2.teacher_targets(config, *logits, centres, temperature)
        outputs = student(crops, places, inputs.local, masks)
        loss, terms = dinov2.total_loss(outputs, *targets, weights, config)
        loss.backward()
        compare(
            g,
            f"s{step}_display_",
            dino_global_crops_loss=terms["dino_global"],
            dino_local_crops_loss=terms["dino_local"],
            ibot_loss=terms["ibot"] / 2,  # the reference shows it halved
            koleo_loss=terms["koleo"] / 20,  # halved and weighted
        )
        found = {"total": loss, "grad_norms": norms(student, state, True)}
        clipped = torch.stack(dinov2.clip_gradients(student, clip))
        compare(g, f"s{step}_", clip_norms=clipped, **found)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()))
        found = {"student_param_norms": norms(student, state)}
        found["teacher_param_norms"] = norms(teacher, state)
        compare(g, f"s{step}_", atol=5e-4, rtol=5e-4, **found)
    found = {"cls_token": student.encoder.cls_token, "teacher_norm_w": teacher.encoder.norm.weight}
    compare(g, "final_", atol=5e-4, **found, last_layer_g=student.dino_head.last_layer.weight_g)


def test_knn_and_pca():
    g = golden("knn")
    sets = (g.train, g.train_labels, g.test)
    # the reference votes with a softmax over the most neighbours
    total = common.knn(*sets, 20, g.T).sum(1, keepdim=True)
    for k in g.ks.tolist():
        scores = common.knn(*sets, k, g.T)
        top1 = common.top1(scores, g.test_labels) / 100
        compare(g, **{f"probas_{k}": scores / total, f"top1_{k}": top1})
    scores = [common.knn(*sets, k) for k in (10, 20, 100, 200)]
    best = max(common.top1(x, g.test_labels) for x in scores)
    assert dinov2.best_knn(*sets, g.test_labels) == best
    g = golden("pca")
    x = g.features.double()
    components, scores = dinov2.principal_components(x, 1)
    compare(g, atol=1e-9, pc1=components[0], proj1=scores[:, 0])
    compare(g, atol=1e-9, sv1=scores.norm(dim=0))
    components, scores = dinov2.principal_components(x[g.fg], 3)
    compare(g, atol=1e-9, pc3=components, proj3=scores, sv3=scores.norm(dim=0))
    compare(g, atol=1e-9, rgb=dinov2.pca_colours(x.view(3, 16, 6)))


def test_curation():
    g = golden("curation")
    pool, refs, queries, more = (
        g[name].double() for name in ("pool", "refs", "queries", "queries2")
    )
    label, kept = dinov2.self_dedup(pool, g.k, g.self_thr)
    compare(g, self_component=label, self_keep=kept)
    pool = pool[kept]
    rest = dinov2.relative_dedup(pool, refs, g.k, g.rel_thr)
    direct = dinov2.relative_dedup(pool, refs, g.k, g.rel_thr, direct=True)
    compare(g, "rel_keep_", component=rest, direct=direct)
    pool = pool[rest]
    similarity, nearest = dinov2.neighbours(queries, pool, g.retr_k)
    compare(g, "retr_", atol=1e-9, sim=similarity, idx=nearest, unique=nearest.unique())
    centroids = dinov2.spherical_kmeans(pool, pool[: g.km_C], g.km_iters)
    ours = dinov2.assign(pool, centroids)
    theirs = dinov2.assign(more, centroids)
    compare(g, "km_", atol=1e-9, centroids=centroids, assign=ours)
    compare(g, "q2_", assign=theirs, counts=theirs.bincount(minlength=g.km_C))
    found = dinov2.retrieve_by_cluster(theirs, ours)
    compare(g, candidate_pool_idx=found, selected_clusters=ours[found].unique())
    few = torch.tensor([0, 0, 0, 1, 1, 1, 1])  # more than three queries are needed
    assert dinov2.retrieve_by_cluster(few, few).tolist() == [3, 4, 5, 6]


# ------------------------------------------------------------------------------------------ views


def test_released_draws_give_the_golden_crops():
    """Drawn by tests/reference_dinov2.py, changed by the operations on a batch."""
    g = golden("augment")
    image = Image.fromarray(g.image.numpy())
    for i in (1, 0):
        torch.manual_seed(int(g[f"aug{i}_seed"]))
        for kind in reference.CROPS:
            crops = dinov2.augment(*reference.draw_crops(image, kind))
            difference = (crops - g[f"aug{i}_{kind}_crops_uint8"]).abs()
            # what `OPERATIONS` allows: PIL goes through HSV of 8 bits
            assert difference.max() <= 8 and difference.mean() < 1
    compare(g, atol=0.02, aug0_local0_normalized=common.normalize(crops)[0])  # a grey level
    torch.manual_seed(int(g.rrc_seed))
    for kind, (_, scale, _) in reference.CROPS.items():
        close([common.random_crop(45, 37, scale, None) for _ in range(6)], g[f"rrc_params_{kind}"])
    split = common.in_memory(g.image[None].numpy(), [0], ["a"], "val")
    crop = common.normalize(common.centre_crops(split, 28, [0])[1])[0]
    # four grey levels; a shift by a pixel makes more than ten
    assert (crop - g.eval_resize32_crop28).abs().mean() < 0.068
    g = golden("samplers")  # the released order of the data; the script's is by seed and epoch
    for (name, order), rank in itertools.product(reference.ORDERS.items(), range(2)):
        found = itertools.islice(order(11, rank, 2, int(g.seed)), 15)
        close(list(found), g[f"{name}_r{rank}of2_n11"])


OPERATIONS = rows("""
brightness_1.3  brightness   1.3
contrast_0.7    contrast     0.7
saturation_1.2  saturation   1.2
hue_0.08        hue          0.08
hue_m0.1        hue         -0.1
gray            grey         0
blur9_sigma0.5  blur         0.5
blur9_sigma1.7  blur         1.7
solarize128     solarize     0
""")


@pytest.mark.parametrize("name, operation, amount", OPERATIONS)
def test_operations_are_the_golden_operations(name, operation, amount):
    g = golden("augment")
    image = g.op_in.permute(2, 0, 1)[None].float()
    found = getattr(dinov2, operation)(image, torch.tensor([float(amount)]))
    difference = (found[0].permute(1, 2, 0) - g[f"op_{name}"]).abs()
    # PIL goes through HSV of 8 bits and cuts the shift to n/255 of a turn: up to six levels of
    # a channel. Ours does not.
    most, mean = (7, 1) if operation == "hue" else (1, 0.1)
    assert difference.max() <= most and difference.mean() < mean


def test_draws_of_a_step(monkeypatch):
    """How often and how far two global and two local crops are changed, and two without blur."""
    drawn = []
    monkeypatch.setattr(dinov2, "augment", lambda images, *draws: drawn.append(draws) or images)
    for kind, blur in (("global", True), ("local", True), ("local", False)):
        config = Config(batch=4000, blur=blur)
        dinov2.augment_views(torch.zeros(2, 4000, 3, 1, 1), config, kind, 0)
    order, amounts = map(torch.cat, zip(*drawn, strict=True))
    done = (order[:, :, None] == torch.arange(8)).any(1)  # which operations
    shares = done.view(6, 4000, 8).double().mean(1)
    often = [0.5] + 4 * [0.8] + [0.2]  # mirror, four of jitter, grey
    close(shares[:, :6].mean(0), often, atol=0.02)
    blur = shares[:3, 6]
    compare(golden("augment"), "blur_", atol=0.03, requested_p=1 - blur, actual_fraction=blur)
    close(shares[4:, 6], [0, 0])
    close(shares[:, 7], [0, 0.2, 0, 0, 0, 0], atol=0.03)
    low, high = amounts[:, 1:5].aminmax(dim=0)
    close(low, [0.6, 0.6, 0.8, -0.1], atol=2e-3)
    close(high, [1.4, 1.4, 1.2, 0.1], atol=2e-3)
    jitter = order[order[:, 1] >= 0, 1:5]
    close(jitter.double().mean(0), [2.5] * 4, atol=0.05)  # in any order
    g = golden("masks")
    for kind in dinov2.RARE:  # the images of a crop stand together
        found = dinov2.augment_views(g[f"col_in_{kind}"].transpose(0, 1), Config(batch=6), kind, 0)
        close(found, common.normalize(g[f"col_{kind}"]))


def test_sides_of_crops():
    """Of a ramp one sees how much of it is in a crop: areas of 0.32 to 1, or 0.05 to 0.32."""
    ramp = np.linspace(0, 1, 48)[:, None]
    images = np.broadcast_to(255 * ramp, (1, 48, 48, 3))
    split = common.in_memory(images, [0], ["a"], "train")
    sides = []
    for crops in dinov2.make_views(split, Config(batch=400), 0, 1, 0)[:2]:
        low, high = crops.flatten(2).aminmax(dim=2)
        sides.append((high - low) / 255)
    close(sides[0].min(), 0.5, atol=0.07)
    close(torch.stack(sides[1].aminmax()), [0.2, 0.65], atol=0.07)


# ------------------------------------------------------------------------------- weights, presets

# encoders with the 1,370 positions of 518 pixels; four registers have 4 x width more
RELEASED = rows("""
vits14_distilled          22_056_576
vitb14_distilled          86_580_480
vitl14_distilled         304_368_640
vitg14                 1_136_480_768
vits14_reg4_distilled     22_058_112
vitg14_reg4            1_136_486_912
""")


def test_presets_have_the_released_sizes():
    with torch.device("meta"):
        for name, expected in RELEASED:
            assert count(dinov2.Encoder(preset(name, image_size=518))) == int(expected)


def test_weights_of_the_hub_of_snapshots_and_of_timm(capsys):
    """Snapshots have prefixes, heads and chunked blocks; timm's files lack mask_token."""
    for name in ("dinov2", "dinov2_reg_swiglu"):
        g = golden_tensors(f"hub/{name}", "expected")
        encoder = load_encoder(GOLDEN / "hub" / name / "model.safetensors", 2)
        compare(g, tokens=encoder(g.images))
    state = torch.load(SWIGLU, weights_only=True)
    snapshot = {"dino_head.mlp.0.weight": torch.ones(20, 14)}
    for name, value in state.items():
        snapshot["module.backbone." + name.replace("blocks.", "blocks.1.")] = value
    torch.save({"teacher": snapshot}, "snapshot.pth")
    del state["mask_token"]
    torch.save({"model": state}, "timm.pth")
    for path in ("snapshot.pth", "timm.pth"):
        found = load_encoder(path, 2).state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    flags = "--init snapshot.pth --no-train --eval features --device cpu"
    assert "add --heads" in refused(capsys, SCRIPT, flags)


def test_official_checkpoint_in_features_and_picture_out():
    """On one rank, and on two with a probe on fresh crops; and it can be trained."""
    photographs(Path("photos"), size=(24, 24))
    torch.save({"weight": torch.randn(2, 24), "bias": torch.zeros(2)}, "head.pth")
    flags = f"--init {MLP} --heads 3 --no-train --precision fp32 --device cpu --data photos"
    flags += " --workers 0 --tokens --image-size 24 --probe-epochs 2 --probe-batch 8"
    flags += " --linear-head head.pth --eval features,picture,knn,linear,head --out"
    run(flags, "one")
    run_several(f"dinov2 {flags} two --probe-augment", ranks=2)
    run(flags, "tuned --train --preset toy --batch 8 --local-size 8 --steps 1 --eval none")
    pixels = common.centre_crops(common.open_split("photos", "val"), 24, range(12))[1]
    tokens = load_encoder(MLP, 3)(common.normalize(pixels))  # [12, 37, 12]
    probes = {"knn", "linear"}
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        compare(found, features=tokens[:, 0], tokens=tokens[:, 1:])
        assert Path(out, "picture.png").exists()
        results = log_rows(out)[-1]["eval"]
        columns = {name: set(scores) for name, scores in results.items()}
        assert columns == {"trained": probes | {"head"}, "random": probes, "pixels": probes}


# ----------------------------------------------------------------- distillation, high resolution


def test_distillation(capsys):
    """The student takes the teacher's prototypes; typed flags that contradict it are refused."""
    run(SCRIPT.small, "--steps 2 --drop-path 0.3 --out teacher")
    flags = re.sub(r"--(ibot-)?prototypes \d+|--width 16", "", SCRIPT.small)
    flags += " --width 8 --steps 2 --teacher teacher/last.pt --distill-tokens 0.3 --out"
    run(flags, "student")
    state = torch.load("student/last.pt", weights_only=True)
    config = Config(**state["config"])
    assert (config.prototypes, config.ibot_prototypes, config.drop_path) == (16, 12, 0.0)
    before = dinov2.build(config)[0].state_dict()
    after = state["model"]
    same = [name for name in after if torch.equal(before[name], after[name])]
    assert same == ["encoder.mask_token"]
    assert not torch.equal(state["target"]["encoder.cls_token"], after["encoder.cls_token"])
    assert "is no run of dinov2.py" in refused(capsys, SCRIPT, f"--teacher {MLP}")
    for more in ("--prototypes 99", "--drop-path 0.1", "--no-separate-heads", "--patch 6"):
        assert "contradicts teacher/last.pt" in refused(capsys, SCRIPT, flags, "no", more)


def test_high_resolution_takes_over_weights_and_configuration(capsys):
    """Typed flags aside. Positions are interpolated, which is said."""
    run(SCRIPT.small, "--steps 2 --momentum 0.9 --out low")
    flags = "--init low/last.pt --image-size 32 --local-size 16 --steps 1 --lr 0 --eval none"
    run(flags, "--device cpu --precision fp32 --workers 0 --out high")
    assert "interpolated from" in capsys.readouterr().out
    low, high = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("low", "high"))
    typed = {"image_size": 32, "local_size": 16, "steps": 1, "lr": 0.0, "out": "high"}
    assert high["config"] == {**low["config"], **typed, "init": "low/last.pt"}
    for name, value in low["model"].items():
        if "pos_embed" not in name:
            close(high["model"][name], value)


# --------------------------------------------------------------------------------------- curation


def test_curate_command(capsys):
    """Planted duplicates and leaks go, queries choose; the list is trained on."""
    photographs(Path("pool"), count=40, splits=".", classes=".")
    x = np.random.default_rng(0).standard_normal((50, 16), dtype=np.float32)
    names = [f"{i}.jpg" for i in range(50)]
    files = {"pool": np.arange(50) % 40, "refs": range(30, 50), "queries": range(8)}
    for file, rows in files.items():
        np.savez(f"{file}.npz", features=x[rows], paths=np.array(names)[rows])
    flags = "curate --pool pool.npz --refs refs.npz --out list.txt"
    near = "--queries queries.npz queries.npz"
    lists = []
    for more in (f"{near} --clusters 2 --per-cluster 5", f"{near} --per-query 1", ""):
        run(flags, more)
        lists.append(Path("list.txt").read_text().splitlines())
    by_cluster, *others = lists
    assert others == [names[:8], names[:30]]
    assert 1 <= len(by_cluster) <= 10 and set(by_cluster) <= set(names[:30])
    run(SCRIPT.folder, "--data pool --list list.txt --steps 1")
    printed = capsys.readouterr().out
    assert "self-dedup: 40 of 50 kept" in printed and "30 samples" in printed
    Path("cut.npz").write_bytes(Path("pool.npz").read_bytes()[:2000])
    for pool in ("nowhere.npz", "cut.npz"):
        assert "no file of --eval" in refused(capsys, SCRIPT, flags, "--pool", pool)
    assert "--querys" in refused(capsys, SCRIPT, flags, "--querys x")


# --------------------------------------------------------------------------------------- learning


def test_it_learns():
    """In half a minute on the toy: two views find each other, features beat a random encoder's."""
    flags = "--preset toy-student --steps 110 --local-crops 1 --probe-epochs 3 --workers 0"
    run(flags, "--device cpu --no-compile --out learnt")
    *steps, own, evaluation = log_rows("learnt")
    assert own["view_found"] > 1.2, "chance is 0.4"
    trained, random = (evaluation["eval"][name] for name in ("trained", "random"))
    assert trained["knn"] > random["knn"] + 4 and trained["linear"] > random["linear"] + 3
    assert steps[-1]["prototypes"] > 32, "collapsed"
