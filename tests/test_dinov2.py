"""dinov2.py against the reference's numbers (tests/golden/dinov2) and its own promises."""

import itertools
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import log_rows, run_several
from PIL import Image
from reference_dinov2 import eval_transform_pil, infinite_order, sharded_order, views_pil
from test_runs import SCRIPTS, assert_same, here, photographs, refused, weights

import common
import dinov2
from dinov2 import Config

GOLDEN = Path(__file__).parent / "golden" / "dinov2"
HUB = Path(__file__).parent / "golden" / "hub"


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float32):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=1e-5, rtol=1e-4):
    """Assert that two arrays are equal within the tolerances of the golden files."""
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected, torch.float64), atol=atol, rtol=rtol)


def pretrained(kind):
    """Return the tiny encoder in the released layout, and its golden outputs."""
    files = {"mlp": ("vit_mlp_pretrain.pth", 3), "reg4_swiglu": ("vit_reg4_swiglu_pretrain.pth", 2)}
    name, heads = files[kind]
    encoder = dinov2.load_teacher(GOLDEN / name, heads=heads).encoder
    return encoder, golden(f"vit_forward_{kind}")


KINDS = ["mlp", "reg4_swiglu"]

# ----------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind):
    """Tokens with and without masks, at other resolutions, of several layers, before the norm."""
    encoder, g = pretrained(kind)
    first = 1 + encoder.registers
    x = tensor(g["x"])
    masks = tensor(g["masks"], torch.bool)
    for prefix, mask in (("", None), ("masked_", masks)):
        tokens = encoder(x, mask)
        close(tokens[:, 0], g[f"{prefix}x_norm_clstoken"])
        close(tokens[:, 1:first], g[f"{prefix}x_norm_regtokens"])
        close(tokens[:, first:], g[f"{prefix}x_norm_patchtokens"])
    close(encoder(x)[:, 0], g["default_forward"])
    for size in ("nonsq", "small", "big"):
        tokens = encoder(tensor(g[f"{size}_x"]))
        patches = tokens[:, first:]
        close(tokens[:, 0], g[f"{size}_cls"])
        close(patches.mean(1), g[f"{size}_patch_mean"])
        close(patches[:, :4], g[f"{size}_patch_first4"])
        close(patches[:, -4:], g[f"{size}_patch_last4"])
    layers = encoder(x, layers=2)
    close(torch.stack([t[:1, first:] for t in layers]), g["il2_patch"])
    close(torch.stack([t[:, 0] for t in layers]), g["il2_cls"])
    close(encoder(x, masks)[:, 0], g["list_cls_global"])
    close(encoder(tensor(g["list_local_x"]))[:, 0], g["list_cls_local"])
    encoder.norm = torch.nn.Identity()
    close(encoder(x, masks), g["masked_x_prenorm"])
    layers = encoder(x[:1], layers=len(encoder.blocks))
    side = math.isqrt(layers[0].shape[1] - first)
    maps = [layer[:, first:].mT.unflatten(2, (side, side)) for layer in (layers[0], layers[-1])]
    close(torch.stack(maps), g["il_list_nonorm_reshape"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    encoder, g = pretrained(kind)
    encoder.requires_grad_(True)
    tokens = encoder(tensor(g["x"]), tensor(g["masks"], torch.bool))
    loss = (tokens[:, 0] ** 2).sum() + tokens[:, 1 + encoder.registers :].sin().sum()
    close(loss, g["grad_loss"])
    loss.backward()
    parameters = dict(encoder.named_parameters())
    assert set(g["grad_names"]) == set(parameters)
    columns = [g[key] for key in ("grad_names", "grad_norms", "param_shapes")]
    for name, norm, shape in zip(*columns, strict=True):
        assert str(tuple(parameters[name].shape)).replace(" ", "") == str(shape).replace(" ", "")
        grad = parameters[name].grad
        close(torch.zeros(()) if grad is None else grad.norm(), norm, atol=2e-5)


def test_linear_probe_inputs_and_released_heads():
    encoder, g = pretrained("mlp")
    encoded = dinov2.encode(encoder, tensor(g["x"]))  # [B, 5, D]
    features = encoded.roll(-1, 1)  # there the mean patch comes last
    g = golden("linear_input")
    close(features[:, 3], g["n1_avgpool0"])
    close(features[:, 3:].flatten(1), g["n1_avgpool1"])
    close(features[:, :4].flatten(1), g["n4_avgpool0"])
    close(features.flatten(1), g["n4_avgpool1"])
    for name, key in (("linear", "n1_avgpool1"), ("linear4", "n4_avgpool1")):
        weight = torch.randn(7, g[key].shape[1])
        torch.save({"weight": weight, "bias": torch.ones(7)}, f"{name}.pth")
        scores = dinov2.head_scores(f"{name}.pth", encoded)
        close(scores, tensor(g[key]) @ weight.T + 1, atol=1e-4)


def test_stochastic_depth():
    g = golden("stochastic_depth")
    x = tensor(g["x"])
    w = tensor(g["W"])
    for i in range(3):
        generator = torch.Generator().manual_seed(int(g[f"seed_{i}"]))
        kept = dinov2.draw_kept(float(g[f"ratio_{i}"]), 1, [7], generator)[0][0, 0]
        assert torch.equal(kept, tensor(g[f"perm_{i}"], torch.long)[: len(kept)])
        close(dinov2.add_branch(x, lambda t: (t @ w).tanh(), kept), g[f"y_{i}"])
    encoder, _ = pretrained("mlp")
    images = tensor(g["train_x"])
    local = tensor(g["train_x_local"])
    generator = torch.Generator().manual_seed(int(g["train_seed"]))
    (kept,) = dinov2.draw_kept(0.3, 4, [5], generator)
    close(encoder(images, kept=kept)[:, 0], g["train_cls"])
    generator = torch.Generator().manual_seed(int(g["train_list_seed"]))
    kept, kept_local = dinov2.draw_kept(0.3, 4, [5, 6], generator)
    close(encoder(images, kept=kept)[:, 0], g["train_list_cls_global"])
    close(encoder(local, kept=kept_local)[:, 0], g["train_list_cls_local"])


@pytest.mark.parametrize("i", range(5))
def test_position_interpolation(i):
    g = golden("pos_embed")
    table = tensor(g[f"pe_{i}"])
    grid = g[f"hw_{i}"].tolist()[1:]
    for name, flags in (("off01", (0.1, False)), ("off0_aa", (0.0, True)), ("off0", (0.0, False))):
        close(dinov2.position_table(table, grid, *flags), g[f"out_{i}_{name}"], rtol=0)


def test_swiglu_sizes():
    g = golden("swiglu_sizes")
    for width, hidden in zip(g["dim"].tolist(), g["hidden"].tolist(), strict=True):
        with torch.device("meta"):
            assert dinov2.SwiGLU(width, 4 * width).w3.in_features == hidden


def test_head():
    g = golden("dino_head")
    head = dinov2.Head(12, 20, 8, 24)
    head.load_state_dict(torch.load(GOLDEN / "dino_head.pth", weights_only=True))
    x = tensor(g["x"]).requires_grad_()
    y = head(x)
    close(y, g["y"])
    (y**2).sum().backward()
    parameters = dict(head.named_parameters())
    close(x.grad, g["x_grad"])
    close(torch.stack([parameters[n].grad.norm() for n in g["names"]]), g["grad_norms"])


def test_losses():
    g = golden("losses")
    student = tensor(g["dino_student"]).requires_grad_()
    targets = (tensor(g["dino_teacher_logits"]) / 0.07).softmax(-1)
    loss = dinov2.cross_entropy(student, targets.sum(0)).sum(0).mean()
    loss.backward()
    close(loss, g["dino_loss"])
    close(student.grad, g["dino_grad"])
    for name, arguments in (("T0.04", (0.04,)), ("T0.07", (0.07,)), ("T0.07_iter1", (0.07, 1))):
        close(dinov2.sinkhorn(tensor(g["sk_in"]), *arguments), g[f"sk_out_{name}"])
    masks = tensor(g["ibot_masks"], torch.bool)
    places, weights = dinov2.masked_tokens(masks)
    close(weights, g["ibot_masks_weight"])
    assert torch.equal(places, masks.flatten().nonzero()[:, 0])
    targets = dinov2.sinkhorn(tensor(g["ibot_teacher_logits"]), 0.06)
    close(targets, g["ibot_sk_T006"])
    student = tensor(g["ibot_student"]).requires_grad_()
    loss = (dinov2.cross_entropy(student, targets) * weights).sum() / len(masks)
    loss.backward()
    close(loss, g["ibot_loss"])
    close(student.grad, g["ibot_grad"])
    x = tensor(g["koleo_x"]).requires_grad_()
    loss = dinov2.koleo_loss(x, len(x))
    loss.backward()
    close(loss, g["koleo_loss"])
    close(x.grad, g["koleo_grad"])


def test_sinkhorn_without_rows_and_koleo_with_equal_images():
    assert dinov2.sinkhorn(torch.zeros(0, 5), 0.1).shape == (0, 5)
    targets, centre = dinov2.softmax_centering(torch.zeros(0, 5), torch.ones(1, 5), 0.1)
    assert targets.shape == (0, 5) and torch.equal(centre, torch.full((1, 5), 0.9))
    x = torch.randn(4, 3).repeat(2, 1).requires_grad_()
    dinov2.koleo_loss(x, 8).backward()
    assert x.grad.isfinite().all()


def test_softmax_centering_lags_by_a_step():
    g = golden("losses")
    ibot = [(g[f"ibot_center_in_{i}"], g[f"ibot_center_out_{i}"]) for i in range(3)]
    dino = zip(g["center_in"], g["center_out"], strict=True)
    for states, batches in ((g["center_states"], dino), (g["ibot_center_states"], ibot)):
        centre = torch.zeros(1, states.shape[-1])
        for state, (logits, expected) in zip(states, batches, strict=False):
            close(centre.flatten(), state.flatten())
            targets, centre = dinov2.softmax_centering(tensor(logits), centre, 0.05)
            close(targets, expected)
        close(centre.flatten(), states[-1].flatten())


def test_masks_are_the_reference_masks():
    g = golden("masks")
    for size, patch, largest in g["maxpatch_table"].tolist():
        assert dinov2.largest_block(int(size), int(patch)) == largest
    rng = random.Random(int(g["seed"]))
    for target, expected in zip(g["seeded_targets"].tolist(), g["masks_seeded"], strict=True):
        np.testing.assert_array_equal(dinov2.block_mask(target, 16, 128, rng), expected)
    rng = random.Random(int(g["seed"]) + 1)
    columns = [g[key] for key in ("targets", "stats_mean_std_min_max_fracexact", "pos_marginal")]
    for target, stats, marginal in zip(*columns, strict=True):
        masks = np.stack([dinov2.block_mask(int(target), 16, 128, rng) for _ in range(4000)])
        counts = masks.sum((1, 2))
        ours = [counts.mean(), counts.std(), counts.min(), counts.max(), (counts == target).mean()]
        np.testing.assert_allclose(ours, stats, rtol=1e-9)
        np.testing.assert_allclose(masks.mean(0), marginal, rtol=1e-5)


def official_collation(rng, crops=12):
    """Return masks in the order in which the released collator draws: blocks after each target."""
    edges = np.linspace(0.1, 0.5, crops // 2 + 1)
    targets = itertools.pairwise(edges)
    masks = [dinov2.block_mask(int(256 * rng.uniform(*t)), 16, 128, rng) for t in targets]
    masks += [dinov2.block_mask(0, 16, 128, rng) for _ in range(crops // 2)]
    rng.shuffle(masks)
    return torch.from_numpy(np.stack(masks)).flatten(1)


def test_collation():
    g = golden("masks")
    masks = official_collation(random.Random(int(g["col_seed"])))
    np.testing.assert_array_equal(masks, g["col_masks"])
    places, weights = dinov2.masked_tokens(masks)
    np.testing.assert_array_equal(places, g["col_idx"])
    close(weights, g["col_w"])
    assert len(places) == g["col_n"] <= g["col_upper"]
    for kind in ("global", "local"):  # crop-major, as the views are stacked here
        crops = tensor(g[f"col_in_{kind}"])  # [B, crops, ...]
        close(crops.transpose(0, 1).flatten(0, 1), g[f"col_{kind}"])
    rng = random.Random(int(g["col_seed"]) + 1)
    counts = np.stack([np.sort(official_collation(rng).sum(1)) for _ in range(300)])
    totals = counts.sum(1)
    np.testing.assert_allclose(
        [totals.mean(), totals.std()], g["col_stats_total_mean_std"], rtol=1e-9
    )
    np.testing.assert_allclose(counts.mean(0), g["col_stats_sorted_mean"], rtol=1e-9)


def test_masks_of_a_step():
    config = Config(batch=32, image_size=48, patch=4)
    masks = dinov2.sample_masks(config, 3, range(32))
    shares = masks.float().mean(1).sort().values
    assert masks.shape == (64, 144) and (shares[:32] == 0).all()
    expected = 0.1 + 0.4 * (torch.arange(32) + 0.5) / 32
    assert (shares[32:] - expected).abs().max() < 0.06, "not stratified over the ratios"
    assert not torch.equal(masks, dinov2.sample_masks(config, 4, range(32)))
    part = dinov2.sample_masks(config, 3, range(8, 16)).view(2, 8, -1)
    assert torch.equal(part, masks.view(2, 32, -1)[:, 8:16])


SHORT = {"lr": 4e-3, "weight_decay_final": 0.4, "momentum": 0.992, "freeze_last": 0.01}
LONG = {"lr": 2e-4, "weight_decay_final": 0.2, "momentum": 0.994, "freeze_last": 1 / 500}
LONG.update(batch=3072, warmup=80 / 500, temp_warmup=30 / 500)
TINY = {**SHORT, "batch": 64, "lr": 0.002, "freeze_last": 1 / 6}
TINY.update(warmup=2 / 6, temp_warmup=3 / 6)
RUNS = {
    "vitl16_short": {**SHORT, "batch": 2048, "warmup": 0.1, "temp_warmup": 0.3},
    "vitl14": LONG,
    "tiny": TINY,
}
KEYS = {"lr": "lr", "weight_decay": "wd", "momentum": "momentum", "teacher_temp": "teacher_temp"}
KEYS["last_layer_lr"] = "last_layer_lr"


@pytest.mark.parametrize("name", RUNS)
def test_schedules(name):
    g = golden("schedules")
    config = Config(**RUNS[name])
    ours = [dinov2.schedules(config, int(it), int(g[f"{name}_T"])) for it in g[f"{name}_it"]]
    for field, key in KEYS.items():
        found = [now[field] for now in ours]
        np.testing.assert_allclose(found, g[f"{name}_{key}"], rtol=1e-12, atol=1e-18)
    peak = config.lr * math.sqrt(config.batch / 1024)
    assert peak == pytest.approx(float(g[f"{name}_peak_lr"]), rel=1e-12)


def preset(name, *flags):
    flags = ["--preset", name, *flags]
    return common.parse_config(Config, dinov2.PRESETS, dinov2.DATA_PRESETS, flags)[0]


def test_presets_have_the_released_schedules():
    for name in ("vitl16_short", "vitl14"):
        config = preset(name)
        for key, value in RUNS[name].items():
            assert getattr(config, key) == pytest.approx(value), (name, key)
        assert config.steps == golden("schedules")[f"{name}_T"]
    config = preset("vits14_distilled")
    assert dinov2.schedules(config, 100_000, 625_000)["lr"] == pytest.approx(1e-3)
    assert (config.batch, config.drop_path, config.swiglu) == (2048, 0.0, False)


@pytest.mark.parametrize(
    "tag", ["A_d09_p02", "B_d09_p02", "B_d1_p02", "head_d09_p02", "chunked4x2_d09_p02"]
)
def test_parameter_groups(tag):
    g = golden("param_groups")
    depth = {"A": 4, "B": 2, "h": 4, "c": 4}[tag[0]]
    decay = 1.0 if "_d1_" in tag else 0.9
    rules = [dinov2.parameter_rule(name, depth, decay) for name in g[f"{tag}_names"]]
    np.testing.assert_allclose([r[0] for r in rules], g[f"{tag}_lr_mult"], rtol=1e-12)
    np.testing.assert_allclose([float(r[1]) for r in rules], g[f"{tag}_wd_mult"])
    assert [r[2] for r in rules] == g[f"{tag}_last"].tolist()
    assert len(set(rules)) == g[f"{tag}_nfused"]


SSL = {"image_size": 16, "local_size": 8, "patch": 4, "width": 12, "depth": 2, "heads": 2}
SSL.update(head_hidden=20, bottleneck=8, prototypes=24, ibot_hidden=12, ibot_bottleneck=6)
SSL.update(ibot_prototypes=18, lr_decay=0.9, batch=3, koleo_group=3)
VARIANTS = {
    "sk_sep": {"registers": 2, "centering": "sinkhorn", "separate_heads": True},
    "center_shared": {"registers": 0, "centering": "softmax", "separate_heads": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_training_steps(name):
    """Forward, all losses, clipping, AdamW and EMA together against two steps of the reference."""
    g = golden(f"ssl_step_{name}")
    inputs = golden("ssl_inputs")
    lr, decay, last_lr, momentum, temperature, clip = g["hyper_lr_wd_lastlr_mom_temp_clip"].tolist()
    config = Config(**SSL, **VARIANTS[name])
    student, teacher = dinov2.build(config)
    for network in (student, teacher):  # the reference interpolates so, whatever the registers
        network.encoder.offset = 0.1
        network.encoder.antialias = False
    state = torch.load(GOLDEN / "ssl_student.pth", weights_only=True)["student"]
    state = {k.replace("backbone.", "encoder."): v for k, v in state.items()}
    student.load_state_dict({k: state[k] for k in student.state_dict()})
    with torch.no_grad():
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.copy_(0.9 * theirs + 0.01)
    names = [n.replace("backbone.", "encoder.") for n in g["names"]]
    assert set(names) == {n for n, _ in student.named_parameters()}
    optimizer = dinov2.make_optimizer(student, config)
    ema = common.EMA(teacher, student)
    now = {"lr": lr, "last_layer_lr": last_lr, "weight_decay": decay}
    dinov2.set_rates(optimizer, now)
    modules = [n for n, _ in student.named_children()]
    assert modules == ["encoder", *g["modules"][1:]]
    crops = tensor(inputs["global"])
    local = tensor(inputs["local"])
    centres = [torch.zeros(1, k) for k in (24, 18 if config.separate_heads else 24)]
    for step in range(2):
        masks = tensor(inputs[f"masks{step}"], torch.bool)
        places, weights = dinov2.masked_tokens(masks)
        assert len(weights) <= int(inputs[f"upperbound{step}"]) and masks.shape[1] == g["ntok"]
        with torch.no_grad():
            _, logits, _, patch_logits = teacher(crops, places)
        targets, patch_targets, centres = dinov2.teacher_targets(
            config, logits, patch_logits, centres, temperature
        )
        outputs = student(crops, places, local, masks)
        loss, terms = dinov2.total_loss(outputs, targets, patch_targets, weights, config)
        close(loss, g[f"s{step}_total"])
        # the reference shows iBOT and KoLeo halved, KoLeo weighted
        shown = {"dino_global": 1, "dino_local": 1, "ibot": 0.5, "koleo": 0.05}
        for key, factor in shown.items():
            crops_key = f"{key}_crops" if "dino" in key else key
            close(factor * terms[key], g[f"s{step}_display_{crops_key}_loss"])
        loss.backward()
        gradients = {n: p.grad for n, p in student.named_parameters()}
        close(torch.stack([gradients[n].norm() for n in names]), g[f"s{step}_grad_norms"])
        close(torch.stack(dinov2.clip_gradients(student, clip)), g[f"s{step}_clip_norms"])
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum, torch.ones(()))
        for kind, model in (("student", student), ("teacher", teacher)):
            parameters = dict(model.named_parameters())
            norms = torch.stack([parameters[n].norm() for n in names])
            close(norms, g[f"s{step}_{kind}_param_norms"], atol=5e-4, rtol=5e-4)
    close(student.encoder.cls_token, g["final_cls_token"], atol=5e-4)
    close(student.dino_head.last_layer.weight_g, g["final_last_layer_g"], atol=5e-4)
    close(teacher.encoder.norm.weight, g["final_teacher_norm_w"], atol=5e-4)


def test_knn():
    g = golden("knn")
    train = tensor(g["train"])
    test = tensor(g["test"])
    labels = tensor(g["train_labels"], torch.long)
    wanted = tensor(g["test_labels"], torch.long)
    temperature = float(g["T"])
    # the reference votes with a softmax over the most neighbours
    total = common.knn(train, labels, test, int(max(g["ks"])), temperature).sum(1, keepdim=True)
    found = []
    for k in g["ks"].tolist():
        scores = common.knn(train, labels, test, k, temperature)
        close(scores / total, g[f"probas_{k}"])
        found.append(common.top1(scores, wanted))
        close(found[-1] / 100, g[f"top1_{k}"])
    best = max(common.top1(common.knn(train, labels, test, k), wanted) for k in (10, 20, 100, 200))
    assert dinov2.best_knn(train, labels, test, wanted) == best


def test_pca():
    g = golden("pca")
    x = tensor(g["features"], torch.float64)
    first, scores = dinov2.principal_components(x, 1)
    close(first[0], g["pc1"], atol=1e-9)
    close(scores[:, 0], g["proj1"], atol=1e-9)
    close(scores.norm(dim=0), g["sv1"], atol=1e-9)
    np.testing.assert_array_equal(scores[:, 0] > 0, g["fg"])
    three, scores = dinov2.principal_components(x[tensor(g["fg"], torch.bool)], 3)
    close(three, g["pc3"], atol=1e-9)
    close(scores, g["proj3"], atol=1e-9)
    close(scores.norm(dim=0), g["sv3"], atol=1e-9)
    close(dinov2.pca_colours(x.view(3, 16, 6)), g["rgb"], atol=1e-9)


def test_curation():
    g = golden("curation")
    keys = ("pool", "refs", "queries", "queries2")
    pool, refs, queries, few = (tensor(g[key], torch.float64) for key in keys)
    k = int(g["k"])
    threshold = float(g["rel_thr"])
    label, kept = dinov2.self_dedup(pool, k, float(g["self_thr"]))
    np.testing.assert_array_equal(label, g["self_component"])
    np.testing.assert_array_equal(kept, g["self_keep"])
    pool = pool[kept]
    direct = dinov2.relative_dedup(pool, refs, k, threshold, True)
    np.testing.assert_array_equal(direct, g["rel_keep_direct"])
    rest = dinov2.relative_dedup(pool, refs, k, threshold)
    np.testing.assert_array_equal(rest, g["rel_keep_component"])
    pool = pool[rest]
    similarity, indices = dinov2.neighbours(queries, pool, int(g["retr_k"]))
    np.testing.assert_array_equal(indices, g["retr_idx"])
    close(similarity, g["retr_sim"], atol=1e-9)
    np.testing.assert_array_equal(indices.unique(), g["retr_unique"])
    clusters = int(g["km_C"])
    centroids = dinov2.spherical_kmeans(pool, pool[:clusters], int(g["km_iters"]))
    close(centroids, g["km_centroids"], atol=1e-9)
    ours = dinov2.assign(pool, centroids)
    theirs = dinov2.assign(few, centroids)
    np.testing.assert_array_equal(ours, g["km_assign"])
    np.testing.assert_array_equal(theirs, g["q2_assign"])
    np.testing.assert_array_equal(torch.bincount(theirs, minlength=clusters), g["q2_counts"])
    found = dinov2.retrieve_by_cluster(theirs, ours, int(g["min_count"]))
    np.testing.assert_array_equal(found, g["candidate_pool_idx"])
    assert set(ours[found].tolist()) == set(g["selected_clusters"].tolist())
    few_each = dinov2.retrieve_by_cluster(theirs, ours, int(g["min_count"]), take=2)
    assert len(few_each) == 4 and set(few_each.tolist()) <= set(found.tolist())


# ------------------------------------------------------------------------------------------ views


def test_reference_pipeline_gives_the_golden_crops():
    """tests/reference_dinov2.py works image by image; the batched views are compared with it."""
    g = golden("augment")
    image = Image.fromarray(g["image"])
    for i in range(2):
        torch.manual_seed(int(g[f"aug{i}_seed"]))
        for kind, crops in zip(("global", "local"), views_pil(image, (24, 12), 2), strict=True):
            found = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]).astype(int)
            assert abs(found - g[f"aug{i}_{kind}_crops_uint8"]).max() <= 1
            if i == 0 and kind == "local":
                ours = common.normalize(torch.from_numpy(found[:1]))[0]
                close(ours, g["aug0_local0_normalized"], atol=0.02)  # a grey level
    torch.manual_seed(int(g["rrc_seed"]))
    for kind, scale in (("global", (0.32, 1.0)), ("local", (0.05, 0.32))):
        boxes = [common.random_crop(45, 37, scale, None) for _ in range(6)]
        np.testing.assert_array_equal(boxes, g[f"rrc_params_{kind}"])
    evaluated = common.normalize(tensor(eval_transform_pil(image, 32, 28)).permute(2, 0, 1))
    close(evaluated, g["eval_resize32_crop28"], atol=0.02)


def test_operations_are_the_golden_operations():
    g = golden("augment")
    image = tensor(g["op_in"]).permute(2, 0, 1)[None]
    cases = {"brightness_1.3": 1.3, "contrast_0.7": 0.7, "saturation_1.2": 1.2, "hue_0.08": 0.08}
    cases.update({"hue_m0.1": -0.1, "gray": 0, "solarize128": 0})
    cases.update({"blur9_sigma0.5": 0.5, "blur9_sigma1.7": 1.7})
    names = [operation.__name__.replace("grey", "gray") for operation in dinov2.OPERATIONS]
    for name, amount in cases.items():
        number = names.index(re.match("[a-z]+", name)[0])
        order = torch.full((1, 8), -1)
        order[0, 3] = number
        amounts = torch.full((1, 8), float(amount))
        difference = dinov2.augment(image.clone(), order, amounts)[0].permute(1, 2, 0)
        difference = (difference - tensor(g[f"op_{name}"])).abs()
        # PIL goes through HSV of 8 bits, so a hue that is off by one shows
        assert difference.max() <= (7 if "hue" in name else 1), (name, difference.max())
        assert difference.mean() < (1 if "hue" in name else 0.1), (name, difference.mean())
    nothing = torch.full((1, 8), -1)
    assert torch.equal(dinov2.augment(image.clone(), nothing, torch.zeros(1, 8)), image)


def test_draws_have_the_reference_distribution():
    """Blur as often as released, solarize on the second global crop only, the rest alike."""
    g = golden("augment")
    rare = torch.tensor([*dinov2.RARE["global"], *dinov2.RARE["local"]])  # [3, 2]
    np.testing.assert_allclose(1 - rare[:, 0], g["blur_requested_p"], atol=1e-6)
    u = torch.rand(9000, 17, generator=torch.Generator().manual_seed(0))
    order, amounts = dinov2.draw_augmentation(u, rare.repeat_interleave(3000, 0))
    share = {n: (order == i).any(1).double().view(3, -1).mean(1) for i, n in enumerate("mbcshgxz")}
    np.testing.assert_allclose(share["x"], g["blur_actual_fraction"], atol=0.03)
    np.testing.assert_allclose(share["z"], [0, 0.2, 0], atol=0.03)
    for name, expected in (("m", 0.5), ("b", 0.8), ("h", 0.8), ("g", 0.2)):
        np.testing.assert_allclose(share[name], expected, atol=0.03)
    low = torch.tensor([0.6, 0.6, 0.8, -0.1])
    high = torch.tensor([1.4, 1.4, 1.2, 0.1])
    factors = amounts[:, 1:5]
    assert (factors >= low).all() and (factors <= high).all()
    close(factors.mean(0), (low + high) / 2, atol=0.02)
    jittered = order[order[:, 1] >= 0, 1:5]
    assert (jittered.sort(1).values == torch.arange(1, 5)).all()
    assert abs((jittered[:, 0] == 4).double().mean() - 0.25) < 0.03


def test_views_have_the_reference_pixels():
    """Mean, spread and sharpness of many views of one image, and of a rank's share of them."""
    g = golden("augment")
    torch.manual_seed(0)
    theirs = [views_pil(Image.fromarray(g["image"]), (24, 12), 1) for _ in range(400)]
    split = common.in_memory(np.stack([g["image"]] * 400), np.zeros(400, int), ["a"], "train")
    config = Config(batch=400, local_crops=1)
    pixels, local, masks, _, _, _ = dinov2.make_views(split, config, 0, 1, 0)
    ours = {"global": pixels, "local": local}
    for number, (kind, uint8) in enumerate(ours.items()):
        views = dinov2.augment_views(uint8, config, kind, 0).unflatten(0, uint8.shape[:2])
        part = dinov2.make_views(split, config, 1, 2, 0)[number]
        assert torch.equal(part, uint8[:, 200:])
        half = dinov2.augment_views(part, config, kind, 0, rank=1)
        assert torch.equal(half.unflatten(0, part.shape[:2]), views[:, 200:])
        for k, batched in enumerate(views):
            reference = [tensor(np.array(t[number][k])).permute(2, 0, 1) for t in theirs]
            reference = common.normalize(torch.stack(reference))
            for statistic in (
                torch.mean,
                torch.std,
                lambda x, axes: x.diff(dim=3).abs().mean(axes),
            ):
                a, b = (statistic(x, (1, 2, 3)) for x in (reference, batched))
                error = (a.var() / 400 + b.var() / 400).sqrt()
                assert abs(a.mean() - b.mean()) < 4.5 * error, (kind, k)
                assert 0.7 < a.std() / b.std() < 1.4, (kind, k)


def test_reference_samplers():
    """The released order of the data (the script itself orders by seed and epoch)."""
    g = golden("samplers")
    seed = int(g["seed"])
    for rank in range(2):
        orders = {
            "sharded": sharded_order(11, rank, 2, seed),
            "sharded_new": sharded_order(11, rank, 2, seed, new=True),
            "infinite": infinite_order(11, rank, 2, seed),
        }
        for name, order in orders.items():
            expected = g[f"{name}_r{rank}of2_n11"].tolist()
            assert list(itertools.islice(order, 15)) == expected, name


# ------------------------------------------------------------------------------- weights, presets

SIZES = {  # parameters: encoder, DINO head, iBOT head
    "vitl16_short": (303_351_808, 23_662_848),
    "vitl14": (303_655_168, 57_545_088, 40_505_600),
    "vitg14": (1_134_771_200, 58_593_664, 41_554_176),
}
RELEASED = {  # with the 1,370 positions of 518 pixels
    "vits14_distilled": 22_056_576,
    "vitb14_distilled": 86_580_480,
    "vitl14_distilled": 304_368_640,
    "vitg14": 1_136_480_768,
    "vits14_reg4_distilled": 22_056_576 + 4 * 384,
    "vitg14_reg4": 1_136_480_768 + 4 * 1536,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_papers_sizes(name):
    with torch.device("meta"):
        model = dinov2.DINOv2(preset(name))
    found = [sum(p.numel() for p in part.parameters()) for part in model.children()]
    assert found == list(SIZES[name])


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_the_released_sizes(name):
    with torch.device("meta"):
        encoder = dinov2.Encoder(preset(name, "--image-size", "518"))
    assert sum(p.numel() for p in encoder.parameters()) == RELEASED[name]
    assert encoder.antialias == ("reg4" in name) == (encoder.offset == 0)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg_swiglu"])
def test_weights_of_the_hub(name):
    expected = np.load(HUB / name / "expected.npz")
    encoder = dinov2.load_teacher(HUB / name / "model.safetensors", heads=2).encoder
    close(encoder(tensor(expected["images"])), expected["tokens"])


def test_official_snapshots_and_files_without_mask_token(capsys):
    """Training snapshots with prefixes, heads and chunked blocks; timm's files lack mask_token."""
    flat = torch.load(GOLDEN / "vit_reg4_swiglu_pretrain.pth", weights_only=True)
    encoder, _ = pretrained("reg4_swiglu")
    chunked = {re.sub(r"^blocks\.(\d+)", r"blocks.1.\1", k): v for k, v in flat.items()}
    snapshot = {f"module.backbone.{k}": v for k, v in chunked.items()}
    head = dinov2.Head(14, 20, 8, 24).state_dict()
    snapshot.update({f"dino_head.{k}": v for k, v in head.items()})
    torch.save({"teacher": snapshot}, "snapshot.pth")
    again = dinov2.load_teacher("snapshot.pth", heads=2)
    pairs = zip(encoder.parameters(), again.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    script = SCRIPTS["dinov2"]
    flags = "--no-train --eval features --device cpu --init"
    assert "add --heads" in refused(capsys, script, f"{flags} snapshot.pth")
    del flat["mask_token"]
    torch.save({"model": flat}, "timm.pth")
    again = dinov2.load_teacher("timm.pth", heads=2).encoder
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(again(x), encoder(x))


def test_official_weights_are_trained_on(capsys):
    """At another size positions are interpolated, heads start afresh; both is said."""
    tiny = GOLDEN / "vit_mlp_pretrain.pth"
    flags = SCRIPTS["dinov2"].small.replace("--width 16 --depth 2 --heads 2", "--heads 3")
    sizes = "--image-size 16 --local-size 8 --lr 0 --steps 1 --out tuned"
    here(SCRIPTS["dinov2"], flags, sizes, f"--init {tiny}")
    assert "interpolated" in capsys.readouterr().out
    theirs = torch.load(tiny, weights_only=True)
    found = weights("tuned")[1]
    for name, value in theirs.items():
        if name != "pos_embed":
            torch.testing.assert_close(found[f"target.encoder.{name}"], value, atol=1e-6, rtol=0)


def test_official_checkpoint_in_features_and_picture_out(tmp_path):
    data = photographs(tmp_path / "data", size=(24, 24))
    init = f"--init {GOLDEN / 'vit_mlp_pretrain.pth'} --heads 3 --no-train --precision fp32"
    init += f" --data {data} --image-size 24 --device cpu --workers 0"
    torch.save({"weight": torch.randn(2, 24), "bias": torch.zeros(2)}, "linear_head.pth")
    flags = f"{init} --tokens --probe-epochs 2 --probe-batch 8 --linear-head linear_head.pth"
    flags += " --eval features,picture,knn,linear,head --out"
    here(SCRIPTS["dinov2"], flags, "one")
    here(SCRIPTS["dinov2"], flags, "augmented --probe-augment")
    run_several(f"dinov2 {flags} two", f"dinov2 {flags} three --probe-augment", ranks=2)
    encoder, _ = pretrained("mlp")
    for out in ("one", "two"):
        found = np.load(f"{out}/features.npz")
        assert found["features"].dtype == np.float32 and found["features"].shape == (12, 12)
        assert found["tokens"].shape == (12, 36, 12) and found["labels"].dtype == np.int64
        pixels = [np.asarray(Image.open(data / path)) for path in found["paths"]]
        pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        tokens = encoder(common.normalize(pixels))
        np.testing.assert_allclose(found["features"], tokens[:, 0], atol=1e-5)
        np.testing.assert_allclose(found["tokens"], tokens[:, 1:], atol=1e-5)
        assert Image.open(f"{out}/picture.png").size[0] == 5 * 104
    for out in ("one", "augmented", "two", "three"):
        results = log_rows(out)[-1]["eval"]
        assert set(results["trained"]) == {"knn", "linear", "head"}
        assert set(results["random"]) == set(results["pixels"]) == {"knn", "linear"}


def test_linear_probe_learns_what_is_linear():
    """On separable features 100 %; on labels without features chance."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    cls = F.one_hot(labels, 8).float() + 0.1 * torch.randn(400, 8)
    config = Config(probe_epochs=5, probe_batch=40)
    for features, low, high in ((cls, 100, 100), (torch.randn(400, 8), 0, 60)):
        x = features[:, None].repeat(1, 5, 1)
        batches = common.shuffled_batches(x, labels, 40, 0)
        found, name = dinov2.linear_probe(batches, 50, x, labels, 4, config)
        assert low <= found <= high, (found, name)


# ----------------------------------------------------------------- distillation, high resolution


def test_distillation(capsys):
    """The student takes the teacher's prototypes; typed flags that contradict it are refused."""
    script = SCRIPTS["dinov2"]
    here(script, script.small, "--steps 3 --out teacher")
    small = script.small.replace("--prototypes 16", "").replace("--ibot-prototypes 12", "")
    student = f"{small.replace('--width 16 --depth 2', '--width 8 --depth 1')} --steps 3"
    student += " --teacher teacher/last.pt --out"
    here(script, student, "student")
    state = torch.load("student/last.pt", weights_only=True)
    assert state["config"]["prototypes"] == 16 and state["config"]["ibot_prototypes"] == 12
    before = dinov2.build(Config(**state["config"]))[0].state_dict()
    after = state["model"]
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert "encoder.mask_token" not in changed
    assert {"encoder.cls_token", "dino_head.mlp.0.weight"} <= changed
    average = state["target"]["encoder.cls_token"]
    assert not torch.equal(average, after["encoder.cls_token"]), "the spare average"
    here(script, student, "student --resume")
    here(script, student, "fewer --distill-tokens 0.3")
    official = f"--teacher {GOLDEN / 'vit_mlp_pretrain.pth'}"
    assert "not written by dinov2.py" in refused(capsys, script, official)
    for flags in ("--prototypes 99", "--drop-path 0.1", "--no-separate-heads", "--patch 6"):
        assert "contradicts teacher/last.pt" in refused(capsys, script, student, "no", flags)


def test_high_resolution_takes_over_the_whole_configuration(capsys):
    script = SCRIPTS["dinov2"]
    here(script, script.small, "--steps 2 --lr 0.001 --momentum 0.9 --out low")
    flags = "--init low/last.pt --image-size 32 --local-size 16 --steps 3 --lr 0.0001 --eval none"
    here(script, flags, "--device cpu --no-compile --precision fp32 --out high")
    config = torch.load("high/last.pt", weights_only=True)["config"]
    expected = {"image_size": 32, "local_size": 16, "prototypes": 16, "lr": 1e-4, "steps": 3}
    expected.update(momentum=0.9, batch=16, width=16, koleo_group=4)
    assert {name: config[name] for name in expected} == expected
    assert "interpolated from" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- curation


def test_curate_command(tmp_path, capsys):
    """Planted duplicates and leaks go, the list is trained on."""
    script = SCRIPTS["dinov2"]
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (60, 6, 6, 3), dtype=np.uint8)
    for i in range(60):
        parts = {"pool": i < 40, "refs": 30 <= i < 50, "queries": i < 8}
        image = Image.fromarray(pixels[i]).resize((24, 24))
        for folder in (tmp_path / name for name, wanted in parts.items() if wanted):
            folder.mkdir(exist_ok=True)
            image.save(folder / f"{i:02d}.png")
        if i < 10:
            image.save(tmp_path / "pool" / f"{i:02d}copy.png")
    init = f"--init {GOLDEN / 'vit_mlp_pretrain.pth'} --heads 3 --no-train --eval features"
    for name in ("pool", "refs", "queries"):
        flags = (
            f"--image-size 24 --precision fp32 --device cpu --workers 0 --data {tmp_path / name}"
        )
        here(script, init, flags, f"--out {name}")
    flags = "curate --pool pool/features.npz --refs refs/features.npz --self-threshold 0.99999"
    flags += " --threshold 0.99999 --out"
    here(script, flags, "list.txt")
    lines = Path("list.txt").read_text().splitlines()
    assert lines == [f"{i:02d}.png" for i in range(30)]
    assert "self-dedup: 40 of 50 kept" in capsys.readouterr().out
    here(script, flags, "near.txt --queries queries/features.npz --per-query 1")
    assert Path("near.txt").read_text().splitlines() == lines[:8]
    more = "--queries queries/features.npz --clusters 2 --per-cluster 5"
    here(script, flags, "c.txt", more)
    clusters = Path("c.txt").read_text().splitlines()
    assert 1 <= len(clusters) <= 15 and set(clusters) <= set(lines)
    here(script, script.folder, f"--data {tmp_path / 'pool'} --list list.txt --steps 2 --out t")
    assert "30 images" in capsys.readouterr().out
    assert "--querys" in refused(capsys, script, "curate --pool pool/features.npz --querys x")
    assert "no file of --eval features" in refused(capsys, script, "curate --pool nowhere.npz")


# --------------------------------------------------------------------------------------- learning


def test_it_learns():
    """In half a minute on the toy: two views find each other, kNN beats a random encoder."""
    flags = "--preset toy-student --steps 150 --local-crops 1 --eval knn --workers 0"
    here(SCRIPTS["dinov2"], flags, "--device cpu --no-compile --out learnt")
    *steps, own, evaluation = log_rows("learnt")
    assert own["view_found"] > 1.2, "chance is 0.4"
    results = evaluation["eval"]
    assert results["trained"]["knn"] > results["random"]["knn"] + 4
    assert steps[-1]["feature_std"] > 0.1 and steps[-1]["prototypes"] > 32, "collapsed"


def test_centres_are_saved_and_masks_change_with_the_step():
    script = SCRIPTS["dinov2"]
    flags = [script.small, "--centering softmax --no-separate-heads --drop-path 0.3 --recompute"]
    here(script, *flags, "--steps 6 --out whole")
    here(script, *flags, "--steps 6 --save-every 3 --out parts")
    state = torch.load("parts/last.pt", weights_only=True)
    assert state["centres"]["0"].abs().max() > 0
    assert_same("whole", "parts")


def test_two_ranks_with_softmax_centering_and_every_evaluation():
    """Also sharded and recomputed; what is evaluated is what was saved, on all ranks."""
    script = SCRIPTS["dinov2"]
    flags = f"{script.small} {script.slow} --steps 3 --centering softmax --no-separate-heads"
    shard = "--shard --recompute --eval knn,linear,features,picture --probe-epochs 1"
    run_several(f"dinov2 {flags} --out two", f"dinov2 {flags} {shard} --out shard", ranks=2)
    here(script, flags, "--out one")
    for other in ("two", "shard"):
        assert_same("one", other, tolerance=1e-5, without=script.noise)
    assert set(log_rows("shard")[-1]["eval"]["trained"]) == {"knn", "linear"}
    assert np.load("shard/features.npz")["features"].shape == (2000, 16)
