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
import torch.nn.functional as F
from helpers import GOLDEN, count, golden_tensors, log_rows, norms, run_several
from PIL import Image
from test_runs import SCRIPTS, here, photographs, refused

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


def seeded(seed):
    return torch.Generator().manual_seed(int(seed))


# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name, path, heads", [("mlp", MLP, 3), ("reg4_swiglu", SWIGLU, 2)])
def test_encoder(name, path, heads):
    """Also with masks, at other sizes, of several layers, before the norm; and its gradients."""
    encoder = load_encoder(path, heads).requires_grad_()
    g = golden(f"vit_forward_{name}")
    first = 1 + encoder.registers
    for prefix, mask in (("", None), ("masked_", g.masks)):
        cls, registers, patches = encoder(g.x, mask).tensor_split([1, first], dim=1)
        found = {"clstoken": cls[:, 0], "regtokens": registers, "patchtokens": patches}
        compare(g, prefix + "x_norm_", **found)
    loss = cls.square().sum() + patches.sin().sum()
    loss.backward()
    shapes = {name: str(tuple(p.shape)) for name, p in encoder.named_parameters()}
    assert shapes == dict(zip(g.grad_names, g.param_shapes, strict=True))
    compare(g, atol=2e-5, grad_norms=norms(encoder, g.grad_names, True))
    found = {"default_forward": encoder(g.x)[:, 0], "list_cls_global": cls[:, 0]}
    compare(g, grad_loss=loss, **found, list_cls_local=encoder(g.list_local_x)[:, 0])
    for size in ("nonsq_", "small_", "big_"):
        cls, _, patches = encoder(g[size + "x"]).tensor_split([1, first], dim=1)
        found = {"patch_first4": patches[:, :4], "patch_last4": patches[:, -4:]}
        compare(g, size, cls=cls[:, 0], patch_mean=patches.mean(1), **found)
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
    (kept,) = dinov2.draw_kept(0.3, 4, [5], seeded(g.train_seed))
    compare(g, train_cls=encoder(g.train_x, kept=kept)[:, 0])
    kept, kept_local = dinov2.draw_kept(0.3, 4, [5, 6], seeded(g.train_list_seed))
    found = {
        "global": encoder(g.train_x, kept=kept),
        "local": encoder(g.train_x_local, kept=kept_local),
    }
    compare(g, "train_list_cls_", **{kind: x[:, 0] for kind, x in found.items()})


def test_positions_swiglu_and_head():
    g = golden("pos_embed")
    for i in range(5):
        table = (g[f"pe_{i}"], g[f"hw_{i}"].tolist()[1:])
        ways = {"off01": (0.1,), "off0_aa": (0.0, True), "off0": (0.0,)}
        found = {name: dinov2.position_table(*table, *way) for name, way in ways.items()}
        compare(g, f"out_{i}_", rtol=0.0, **found)
    g = golden("swiglu_sizes")
    swiglus = [dinov2.SwiGLU(d, 4 * d) for d in g.dim.tolist()]
    compare(g, hidden=[layer.w3.in_features for layer in swiglus])
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
    ibot = [(g[f"ibot_center_in_{i}"], g[f"ibot_center_out_{i}"]) for i in range(3)]
    dino = zip(g.center_in, g.center_out, strict=True)
    for states, batches in ((g.center_states, dino), (g.ibot_center_states, ibot)):
        states = itertools.pairwise(states.view(4, 1, -1))
        for (centre, following), (logits, expected) in zip(states, batches, strict=True):
            targets, found = dinov2.softmax_centering(logits, centre, 0.05)
            close(targets, expected)
            close(found, following)
    # a rank may have no masked patches
    targets, found = dinov2.softmax_centering(logits[:0], centre, 0.1)
    assert targets.shape == dinov2.sinkhorn(logits[:0], 0.1).shape == (0, 18)
    close(found, 0.9 * centre)


def test_masks_are_the_reference_masks():
    g = golden("masks")
    sizes, patches, largest = g.maxpatch_table.T.tolist()
    close([*map(dinov2.largest_block, sizes, patches)], largest)
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
    masks = dinov2.sample_masks(config, 3, range(32))
    shares = masks.double().mean(1).sort().values
    drawn = 0.1 + 0.4 * (torch.arange(32) + 0.5) / 32
    close(shares[32:], drawn - 0.02, atol=0.03)  # the last block may not fit
    assert (shares[:32] == 0).all()
    assert not torch.equal(masks, dinov2.sample_masks(config, 4, range(32)))


def test_schedules():
    g = golden("schedules")
    tiny = {"warmup": 2 / 6, "temp_warmup": 3 / 6, "freeze_last": 1 / 6}
    configs = {name: preset(name) for name in ("vitl16_short", "vitl14")}
    configs["tiny"] = Config(steps=30, lr=0.002, **tiny)
    for name, config in configs.items():
        now = functools.partial(dinov2.schedules, config, steps=config.steps)
        rows = [now(step) for step in g[f"{name}_it"].tolist()]
        found = {key: [row[key] for row in rows] for key in rows[0]}
        found["wd"] = found.pop("weight_decay")
        peak = now(round(config.warmup * config.steps))["lr"]
        compare(g, f"{name}_", atol=1e-18, rtol=1e-12, T=config.steps, peak_lr=peak, **found)


def test_parameter_groups():
    g = golden("param_groups")
    for tag in ("A_d09_p02", "B_d09_p02", "B_d1_p02", "head_d09_p02", "chunked4x2_d09_p02"):
        depth = 2 if tag[0] == "B" else 4
        decay = 1.0 if "_d1_" in tag else 0.9
        rules = [dinov2.parameter_rule(name, depth, decay) for name in g[f"{tag}_names"]]
        scales, decays, last = zip(*rules, strict=True)
        found = {"lr_mult": scales, "wd_mult": decays, "last": last}
        compare(g, f"{tag}_", atol=1e-12, rtol=0.0, nfused=len(set(rules)), **found)


SSL = {"image_size": 16, "local_size": 8, "patch": 4, "width": 12, "depth": 2, "heads": 2}
SSL.update(head_hidden=20, bottleneck=8, prototypes=24, ibot_hidden=12, ibot_bottleneck=6)
SSL.update(ibot_prototypes=18, lr_decay=0.9, batch=3, koleo_group=3)
SHARED = {"centering": "softmax", "separate_heads": False}


@pytest.mark.parametrize("name, more", [("sk_sep", {"registers": 2}), ("center_shared", SHARED)])
def test_two_training_steps(name, more):
    """Forward, all losses, clipping, AdamW and EMA together against two steps of the reference."""
    g = golden(f"ssl_step_{name}")
    inputs = golden("ssl_inputs")
    lr, decay, last_lr, momentum, temperature, clip = g.hyper_lr_wd_lastlr_mom_temp_clip.tolist()
    config = Config(**SSL, **more)
    student, teacher = dinov2.build(config)
    for network in (student, teacher):  # the reference interpolates so, whatever the registers
        network.encoder.offset = 0.1
        network.encoder.antialias = False
    saved = torch.load(FILES / "ssl_student.pth", weights_only=True)["student"]
    names = [name.replace("backbone.", "encoder.") for name in g.names]
    state = {ours: saved[theirs] for ours, theirs in zip(names, g.names, strict=True)}
    student.load_state_dict(state)
    teacher.load_state_dict({name: 0.9 * value + 0.01 for name, value in state.items()})
    assert [name for name, _ in student.named_children()] == ["encoder", *g.modules[1:]]
    optimizer = dinov2.make_optimizer(student, config)
    ema = common.EMA(teacher, student)
    rates = {"lr": lr, "last_layer_lr": last_lr, "weight_decay": decay}
    dinov2.set_rates(optimizer, rates)
    centres = [torch.zeros(1, 24), torch.zeros(1, 18 if config.separate_heads else 24)]
    crops = inputs["global"]
    for step in range(2):
        masks = inputs[f"masks{step}"]
        places, weights = dinov2.masked_tokens(masks)
        assert len(weights) <= inputs[f"upperbound{step}"] and masks.shape[1] == g.ntok
        with torch.no_grad():
            _, logits, _, patch_logits = teacher(crops, places)
        outputs = student(crops, places, inputs.local, masks)
        logits = (logits, patch_logits, centres, temperature)
        *targets, centres = dinov2.teacher_targets(config, *logits)
        loss, terms = dinov2.total_loss(outputs, *targets, weights, config)
        # the reference shows iBOT and KoLeo halved, KoLeo weighted
        factors = {"dino_global_crops": 1, "dino_local_crops": 1, "ibot": 0.5, "koleo": 0.05}
        for (name, factor), term in zip(factors.items(), terms.values(), strict=True):
            close(factor * term, g[f"s{step}_display_{name}_loss"])
        loss.backward()
        gradients = norms(student, names, True)
        clipped = torch.stack(dinov2.clip_gradients(student, clip))
        compare(g, f"s{step}_", total=loss, grad_norms=gradients, clip_norms=clipped)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()))
        found = {"student_param_norms": norms(student, names)}
        found["teacher_param_norms"] = norms(teacher, names)
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
        close(scores / total, g[f"probas_{k}"])
        close(common.top1(scores, g.test_labels) / 100, g[f"top1_{k}"])
    scores = [common.knn(*sets, k) for k in (10, 20, 100, 200)]
    best = max(common.top1(x, g.test_labels) for x in scores)
    assert dinov2.best_knn(*sets, g.test_labels) == best
    g = golden("pca")
    x = g.features.double()
    components, scores = dinov2.principal_components(x, 1)
    found = {"pc1": components[0], "proj1": scores[:, 0], "sv1": scores.norm(dim=0)}
    components, scores = dinov2.principal_components(x[g.fg], 3)
    found.update(pc3=components, proj3=scores, sv3=scores.norm(dim=0))
    compare(g, atol=1e-9, **found, rgb=dinov2.pca_colours(x.view(3, 16, 6)))


def test_curation():
    g = golden("curation")
    label, kept = dinov2.self_dedup(g.pool, g.k, g.self_thr)
    compare(g, self_component=label, self_keep=kept)
    pool = g.pool.double()[kept]
    refs = (g.refs.double(), g.k, g.rel_thr)
    rest = dinov2.relative_dedup(pool, *refs)
    compare(g, rel_keep_component=rest, rel_keep_direct=dinov2.relative_dedup(pool, *refs, True))
    pool = pool[rest]
    similarity, nearest = dinov2.neighbours(g.queries.double(), pool, g.retr_k)
    compare(g, "retr_", atol=1e-9, sim=similarity, idx=nearest, unique=nearest.unique())
    centroids = dinov2.spherical_kmeans(pool, pool[: g.km_C], g.km_iters)
    ours = dinov2.assign(pool, centroids)
    theirs = dinov2.assign(g.queries2.double(), centroids)
    compare(g, "km_", atol=1e-9, centroids=centroids, assign=ours)
    compare(g, "q2_", assign=theirs, counts=theirs.bincount(minlength=g.km_C))
    found = dinov2.retrieve_by_cluster(theirs, ours, g.min_count)
    compare(g, candidate_pool_idx=found, selected_clusters=ours[found].unique())
    few = torch.tensor([0, 0, 0, 1, 1, 1, 1])  # more than three queries are needed
    assert dinov2.retrieve_by_cluster(few, torch.tensor([1, 0, 1])).tolist() == [0, 2]


# ------------------------------------------------------------------------------------------ views


def test_released_draws_give_the_golden_crops():
    """Drawn by tests/reference_dinov2.py, changed by the operations on a batch."""
    g = golden("augment")
    image = Image.fromarray(g.image.numpy())
    for i in (1, 0):
        torch.manual_seed(int(g[f"aug{i}_seed"]))
        for kind in ("global", "local"):
            crops = dinov2.augment(*reference.draw_crops(image, kind))
            difference = (crops - g[f"aug{i}_{kind}_crops_uint8"]).abs()
            # what `OPERATIONS` allows: PIL goes through HSV of 8 bits
            assert difference.max() <= 8 and difference.mean() < 1
    compare(g, atol=0.02, aug0_local0_normalized=common.normalize(crops)[0])  # a grey level
    torch.manual_seed(int(g.rrc_seed))
    for kind, scale in (("global", (0.32, 1.0)), ("local", (0.05, 0.32))):
        close([common.random_crop(45, 37, scale, None) for _ in range(6)], g[f"rrc_params_{kind}"])
    split = common.in_memory(g.image[None].numpy(), [0], ["a"], "val")
    pixels = common.centre_crops(split, 28, [0])[1]
    pixels = pixels[0] / 255 - g.eval_resize32_crop28 * common.STD - common.MEAN
    assert pixels.abs().mean() < 4 / 255  # a shift by a pixel makes more than 10
    g = golden("samplers")  # the released order of the data; the script's is by seed and epoch
    for (name, order), rank in itertools.product(reference.ORDERS.items(), range(2)):
        found = itertools.islice(order(11, rank, 2, int(g.seed)), 15)
        close(list(found), g[f"{name}_r{rank}of2_n11"])


OPERATIONS = (
    ("brightness_1.3", 1, 1.3),
    ("contrast_0.7", 2, 0.7),
    ("saturation_1.2", 3, 1.2),
    ("hue_0.08", 4, 0.08),
    ("hue_m0.1", 4, -0.1),
    ("gray", 5, 0.0),
    ("blur9_sigma0.5", 6, 0.5),
    ("blur9_sigma1.7", 6, 1.7),
    ("solarize128", 7, 0.0),
)


def test_operations_are_the_golden_operations():
    g = golden("augment")
    image = g.op_in.permute(2, 0, 1)[None].float()
    order = torch.full((1, 8), -1)
    for name, number, amount in OPERATIONS:
        order[0, 3] = number
        found = dinov2.augment(image.clone(), order, torch.full((1, 8), amount))
        difference = (found[0].permute(1, 2, 0) - g[f"op_{name}"]).abs()
        # PIL goes through HSV of 8 bits and cuts the shift to n/255 of a turn: up to six levels of
        # a channel. Ours does not.
        assert difference.max() <= (7 if number == 4 else 1), name
        assert difference.mean() < (1 if number == 4 else 0.1), name


def test_draws_of_a_step(monkeypatch):
    """How often and how far two global and two local crops are changed, and two without blur."""
    drawn = []
    monkeypatch.setattr(dinov2, "augment", lambda images, *draws: drawn.append(draws) or images)
    for kind, blur in (("global", True), ("local", True), ("local", False)):
        config = Config(batch=4000, blur=blur)
        dinov2.augment_views(torch.zeros(2, 4000, 3, 1, 1), config, kind, 0)
    order, amounts = map(torch.cat, zip(*drawn, strict=True))
    done = F.one_hot(order + 1, 9).amax(1)  # which operations
    shares = done.view(6, 4000, 9).double().mean(1)
    blur = shares[:3, 7]
    compare(golden("augment"), "blur_", atol=0.03, requested_p=1 - blur, actual_fraction=blur)
    close(shares[4:, 7], [0, 0])
    close(shares[:, 8], [0, 0.2, 0, 0, 0, 0], atol=0.03)
    close(shares[:, 1].mean(), 0.5, atol=0.02)
    close(shares[:, 2:7].mean(0), [0.8] * 4 + [0.2], atol=0.02)
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
    ramp = np.linspace(0, 255, 48)[:, None]
    image = np.broadcast_to(ramp, (1, 48, 48, 3))
    split = common.in_memory(image, [0], ["a"], "train")
    crops = dinov2.make_views(split, Config(batch=400), 0, 1, 0)
    sides = []
    for pixels in crops[:2]:
        low, high = pixels.flatten(2).aminmax(dim=2)
        sides.append((high - low) / 255)
    close(sides[0].min(), 0.5, atol=0.07)
    close(torch.stack(sides[1].aminmax()), [0.2, 0.65], atol=0.07)


# ------------------------------------------------------------------------------- weights, presets

SIZES = {  # parameters: encoder, DINO head, iBOT head
    "vitl16_short": [303_351_808, 23_662_848],
    "vitl14": [303_655_168, 57_545_088, 40_505_600],
    "vitg14": [1_134_771_200, 58_593_664, 41_554_176],
}
RELEASED = {  # with the 1,370 positions of 518 pixels
    "vits14_distilled": 22_056_576,
    "vitb14_distilled": 86_580_480,
    "vitl14_distilled": 304_368_640,
    "vitg14": 1_136_480_768,
    "vits14_reg4_distilled": 22_056_576 + 4 * 384,
    "vitg14_reg4": 1_136_480_768 + 4 * 1536,
}


def test_presets_have_the_papers_and_the_released_sizes():
    with torch.device("meta"):
        for name, expected in SIZES.items():
            model = dinov2.DINOv2(preset(name))
            assert [count(part) for part in model.children()] == expected
        for name, expected in RELEASED.items():
            encoder = dinov2.Encoder(preset(name, image_size=518))
            assert count(encoder) == expected
            assert encoder.antialias == ("reg4" in name) == (encoder.offset == 0)


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


def test_official_checkpoint_in_features_and_picture_out(tmp_path):
    """On one rank, and on two with a probe on fresh crops."""
    data = photographs(tmp_path / "data", size=(24, 24))
    torch.save({"weight": torch.randn(2, 24), "bias": torch.zeros(2)}, "head.pth")
    flags = (
        f"--init {MLP} --heads 3 --no-train --precision fp32 --device cpu --workers 0 --data {data}"
    )
    flags += " --tokens --image-size 24 --probe-epochs 2 --probe-batch 8 --linear-head head.pth"
    flags += " --eval features,picture,knn,linear,head --out"
    run(flags, "one")
    run_several(f"dinov2 {flags} two --probe-augment", ranks=2)
    run(flags, "tuned --train --preset toy --batch 8 --local-size 8 --steps 1 --eval none")
    pixels = common.centre_crops(common.open_split(str(data), "val"), 24, range(12))[1]
    for out in ("one", "two"):
        tokens = load_encoder(MLP, 3)(common.normalize(pixels))  # [12, 37, 12]
        found = np.load(f"{out}/features.npz")
        compare(found, features=tokens[:, 0], tokens=tokens[:, 1:])
        assert Image.open(f"{out}/picture.png").size[0] == 5 * 104
        results = log_rows(out)[-1]["eval"]
        assert set(results["trained"]) == {"knn", "linear", "head"}
        assert set(results["random"]) == set(results["pixels"]) == {"knn", "linear"}


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
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {"encoder.mask_token"}
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
    typed.update(init="low/last.pt")
    assert high["config"] == low["config"] | typed
    for name, value in low["model"].items():
        if "pos_embed" not in name:
            close(high["model"][name], value)


# --------------------------------------------------------------------------------------- curation


def test_curate_command(tmp_path, capsys):
    """Planted duplicates and leaks go, queries choose; the list is trained on."""
    photographs(tmp_path / "pool", count=40, splits=(".",), classes=(".",))
    x = np.random.default_rng(0).standard_normal((50, 16), dtype=np.float32)
    names = [f"{i}.jpg" for i in range(50)]
    twice = [*range(40), *range(10)]
    files = {"pool": twice, "refs": [*range(30, 50)], "queries": [*range(8)]}
    for name, rows in files.items():
        np.savez(f"{name}.npz", features=x[rows], paths=np.array(names)[rows])
    flags = "curate --pool pool.npz --refs refs.npz --out"
    near = f"{flags} list.txt --queries queries.npz queries.npz"
    lists = []
    for line in (
        f"{near} --clusters 2 --per-cluster 5",
        f"{near} --per-query 1",
        f"{flags} list.txt",
    ):
        run(line)
        lists.append(Path("list.txt").read_text().splitlines())
    assert "self-dedup: 40 of 50 kept" in capsys.readouterr().out
    assert lists[1:] == [names[:8], names[:30]]
    assert 1 <= len(lists[0]) <= 10 and set(lists[0]) <= set(names[:30])
    run(SCRIPT.folder, f"--data {tmp_path / 'pool'} --list list.txt --steps 1 --out trained")
    assert "30 samples" in capsys.readouterr().out
    assert "--querys" in refused(capsys, SCRIPT, flags, "no.txt --querys x")
    Path("cut.npz").write_bytes(Path("pool.npz").read_bytes()[:2000])
    for pool in ("nowhere.npz", "cut.npz"):
        assert "no file of --eval" in refused(capsys, SCRIPT, flags, "no.txt --pool", pool)


# --------------------------------------------------------------------------------------- learning


def test_it_learns():
    """In half a minute on the toy: two views find each other, readouts beat a random encoder's."""
    flags = "--preset toy-student --steps 110 --local-crops 1 --probe-epochs 3 --workers 0"
    run(flags, "--device cpu --no-compile --out learnt")
    *steps, own, evaluation = log_rows("learnt")
    assert 1.2 < own["view_found"] < 20, "chance is 0.4"
    trained, random = (evaluation["eval"][name] for name in ("trained", "random"))
    assert trained["knn"] > random["knn"] + 4 and trained["linear"] > random["linear"] + 3
    assert steps[-1]["feature_std"] > 0.1 and steps[-1]["prototypes"] > 32, "collapsed"


def test_sinkhorn_and_a_shared_head_on_two_ranks():
    """Softmax centering and separate heads are in test_runs.py."""
    photographs(Path("photos"))
    flags = f"{SCRIPT.folder} {SCRIPT.slow} --data photos --centering sinkhorn --steps 3"
    flags += " --no-separate-heads --out"
    run_several(f"dinov2 {flags} two", ranks=2)
    run(flags, "one")
    for name in ("loss", "gradient_norm"):
        columns = [[row[name] for row in log_rows(out)[:3]] for out in ("one", "two")]
        close(*columns, rtol=5e-5)
