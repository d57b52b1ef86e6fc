"""pixel_vit.py against the numbers of MAE, DiT and timm (tests/golden/pixel_vit), and its promises.

What all scripts promise is in test_runs.py, where this one runs as a masked autoencoder.
"""

import argparse
import colorsys
import functools
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, SHARDS, close, golden_tensors, log_rows, norms, photographs
from helpers import run_several
from PIL import Image
from test_runs import SCRIPTS, assert_same, here, refused, weights

import common
import pixel_vit
from pixel_vit import Config, Diffusion

SCRIPT = SCRIPTS["pixel_vit"]
FILES = GOLDEN / "pixel_vit"
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "pixel_vit")
compare = functools.partial(helpers.compare, atol=1e-5)


def compare_loss(g, model, name, loss, gradients):
    """Compare a loss with golden[name], and the norms of its gradients with golden[gradients]."""
    model.zero_grad()
    loss.mean().backward(retain_graph=True)
    found = {name: loss, gradients: norms(model, g.gradnorm_names, gradients=True)}
    compare(g, rtol=1e-4, atol=1e-9, **found)


# ------------------------------------------------------------------ parity: classifier and MAE


def classifier(readout="gap"):
    """Return the golden ViT on 6 x 6 pixels; its cls variant uses fc_norm as norm."""
    state = torch.load(FILES / "vit_pixel_ckpt.pth", weights_only=True)["model"]
    if readout == "cls":
        state = {name.replace("fc_norm", "norm"): x for name, x in state.items()}
    torch.save({"model": state}, "vit.pth")
    return pixel_vit.load_model("vit.pth", heads=3)[0].requires_grad_()


@pytest.mark.parametrize("readout", ["gap", "cls"])
def test_classifier(readout):
    g = golden("vit_pixel")
    model = classifier(readout)
    compare(g, f"{readout}_", features=model.pooled(g.imgs), logits=model.logits(g.imgs))
    loss = model(g.imgs, g.labels, torch.ones(1, 1), None)
    compare_loss(g, model, f"{readout}_ce", loss, f"{readout}_gradnorm")


def test_pixels_in_another_order():
    """Permuted pixels change the output, positions permuted alike change it back."""
    g = golden("vit_pixel")
    model = classifier()
    compare(g, gap_tokens_prenorm=model.tokens(g.imgs))
    positions = model.pos_embed.data
    model.permutation = g.perm
    compare(g, perm_logits_learned_pe=model.logits(g.imgs))
    positions[:, 1:] = positions[:, 1:][:, g.perm]
    logits = model.logits(g.imgs)
    compare(g, perm_logits_perm_pe=logits, gap_logits=logits)
    positions.zero_()
    logits = model.logits(g.imgs)
    compare(g, nope_logits_perm=logits, nope_logits=logits)


@pytest.mark.parametrize("kind, heads, patch", [("patch", 2, 2), ("pixel", 3, 1)])
def test_mae(kind, heads, patch):
    """The released layout, also read as a classifier, which has no decoder."""
    g = golden(f"mae_{kind}")
    images = g.imgs
    path = FILES / f"mae_{kind}_ckpt.pth"
    model = pixel_vit.load_model(path, heads, decoder_heads=2)[0].requires_grad_()
    keep, restore, mask = pixel_vit.random_masking(g.noise, float(g.mask_ratio))
    compare(g, ids_keep=keep, ids_restore=restore, mask=mask)
    compare(g, latent=model.tokens(images, keep), plain_tokens_norm=model.tokens(images))
    compare(g, latent_mask0=model.tokens(images, g.noise.argsort(1)))
    painted, _ = model.paint(images, g.noise)
    compare(g, pred=painted, unpatchify_of_pred=pixel_vit.unpatchify(painted, patch))
    compare(g, patchify=pixel_vit.patchify(images, patch))
    for target in ("", "_normpix"):
        model.norm_pix = bool(target)
        loss = model(images, g.noise)
        compare_loss(g, model, f"loss{target}", loss, f"gradnorm{target}")
    tuned, _ = pixel_vit.load_model(path, heads, task="classify", classes=5)
    compare(g, plain_tokens_prenorm=tuned.tokens(images))


def test_masking_counts_and_frequencies():
    g = golden("misc_masking")
    for tokens, ratio, kept in g.len_keep_table.tolist():
        assert pixel_vit.kept_tokens(int(tokens), ratio) == max(1, kept)
    noise = torch.rand(2000, 64, generator=torch.Generator().manual_seed(1238))
    mask = pixel_vit.random_masking(noise, 0.75)[2]
    compare(g, keep_fraction_per_position=1 - mask.mean(0))


def test_position_tables():
    g = golden("pos_embed")
    for width, grid in ((16, 4), (24, 5), (8, 3)):
        config = Config(positions="sincos", image_size=grid)
        for special, method in enumerate(("dit", "mae")):  # MAE has a class token
            table = pixel_vit.make_positions(config, width, special)
            compare(g, **{f"{method}_D{width}_G{grid}": table[0]})
    compare(g, interp_out=common.interpolate_positions(g.interp_in, (6, 6)))
    close(pixel_vit.make_positions(Config(image_size=20), 64).std(), 0.02, atol=1e-3)
    assert not pixel_vit.make_positions(Config(positions="none"), 64).any()


# --------------------------------------------------------------------------- parity: optimisation


def test_learning_rate_schedule():
    g = golden("lr_schedule")
    peak = g.arg_lr.item()
    config = Config(lr=peak, lr_floor=g.arg_min_lr.item() / peak, warmup=5 / 40)
    steps = (100_000 * g.epoch).round().tolist()
    found = [pixel_vit.learning_rate(config, step, 4_000_000) for step in steps]
    compare(g, rtol=1e-5, atol=1e-12, lr=found)


def test_layers_learn_at_their_own_rate():
    g = golden("layer_decay")
    model = classifier()
    config = Config(depth=int(g.depth), layer_decay=g.layer_decay.item())
    groups = pixel_vit.make_optimizer(model, config).param_groups
    group_of = {p: group for group in groups for p in group["params"]}
    assert len(group_of) == len(g.names)
    groups = [group_of[model.get_parameter(name)] for name in g.names]
    scales = [group["scale"] for group in groups]
    compare(g, atol=1e-9, lr_scale=scales, weight_decay=[x["weight_decay"] for x in groups])
    close(scales, g.layer_decay ** (g.depth + 1 - g.layer_id), atol=1e-9)
    assert pixel_vit.parameter_rule("cls_token", 3, 2, 1.0)[1], "MAE decays its tokens"


def test_average_of_weights():
    g = golden("ema")
    source = torch.nn.ParameterList([torch.zeros(2, 3)])
    target = torch.nn.ParameterList([g.ema0_w])
    ema = common.EMA(target, source)
    for i, momentum in enumerate((0.9999, 0.9999, 0.9)):
        source[0].data = g.model_w_seq[i]
        ema.update(momentum, torch.ones(()))
        compare(g, **{f"ema{i + 1}_w": target[0]})


def test_stochastic_depth():
    g = golden("drop_path")
    rates = 3 * g.linspace_rates_depth12_rate0p1
    config = Config(image_size=1, depth=12, drop_path=0.3)
    pixels = torch.zeros(6400, 3, 1, 1, dtype=torch.uint8)
    scales = pixel_vit.Classifier.draw(config, pixels, None, 0)[3]
    scales = scales.view(12, 2 * 6400)  # each branch has its own
    close(scales.amax(1), 1 / (1 - rates), atol=1e-6)
    close((scales == 0).float().mean(1), rates, atol=0.015)
    torch.manual_seed(int(g.seed))
    kept = torch.empty(16, 1, 1).bernoulli_(1 - g.p)
    compare(g, out_of_ones=(kept * scales[-1].max()).expand(16, 3, 2))
    block = pixel_vit.DropBlock(8, 2)
    x = torch.randn(2, 5, 8)
    scales = torch.tensor([[0.0, 2.0], [0.0, 0.0]])[..., None, None]  # [branch, image, 1, 1]
    expected = x + scales[0] * block.attn(block.norm1(x))
    close(block(x, scales), expected, atol=1e-6)


def test_linear_probe():
    for decay in (0.0, 0.01):
        g = golden("linprobe")
        weight = torch.nn.Parameter(g.w0)
        bias = torch.nn.Parameter(g.b0)
        groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
        optimizer = pixel_vit.LARS(groups, lr=0.5, momentum=0.9)
        for step in range(3):
            weight.grad = g.grad_w[step]
            bias.grad = g.grad_b[step]
            optimizer.step()
            compare(g, f"wd{decay}_step{step}_", rtol=1e-5, atol=1e-7, w=weight, b=bias)
    head = pixel_vit.probe_head(4, 3)
    norm, linear = head
    linear.load_state_dict({"weight": g.head_w, "bias": g.head_b})
    compare(g, train_out=head(g.feat))
    compare(g, atol=1e-6, running_mean=norm.running_mean, running_var=norm.running_var)
    compare(g, eval_out_after_one_step=head.eval()(g.feat))


# --------------------------------------------------------------------------- parity: augmentation


def test_operations_of_randaugment():
    """At level 9, with either sign, as timm calls PIL: the same pixels."""
    g = golden("randaugment_ops")
    image = Image.fromarray(g.img.numpy())
    for name, operation in zip(g.names, pixel_vit.OPERATIONS.values(), strict=True):
        outputs = [np.array(operation(image, m)) for m in (-0.9, 0.9)]
        assert any(np.array_equal(x, g[f"{name}/out"]) for x in outputs), name


def test_crops():
    g = golden("crops")
    image = Image.fromarray(g.src.numpy())
    for size in (16, 28, 40):
        found = np.array(pixel_vit.centre_crop(image, size))
        compare(g, atol=1, **{f"dit_center_crop_{size}": found})
    random = torch.Generator().manual_seed(1314)
    boxes = [common.random_crop(50, 40, (0.2, 1.0), random) for _ in range(12)]
    compare(g, tvcrop_i_j_h_w=boxes)


def golden_share(g, b):
    """Return what `draw_mix` returns where the reference mixes batch b."""
    if not g[f"b{b}_use_cutmix"]:
        return torch.full((6, 6), g[f"b{b}_lam_final"].item())
    share = torch.ones(6, 6)
    top, bottom, left, right = g[f"b{b}_bbox_yl_yh_xl_xh"].tolist()
    share[top:bottom, left:right] = 0
    return share


def test_mixing():
    g = golden("mixup")
    smoothed = 0.9 * F.one_hot(g.y, 5) + 0.1 / 5
    for b in range(6):
        share = golden_share(g, b)
        images, targets = pixel_vit.mix(g.x, smoothed, share)
        compare(g, f"b{b}_", x=images, target=targets, lam_final=share.mean())
    # the loss smooths targets after they are mixed, which is the same
    model = classifier()
    model.smoothing = 0.1
    model.logits = lambda *_: g.logits
    compare(g, soft_target_ce_b0=model(g.x, g.y, golden_share(g, 0), None))
    loss = model(g.x, g.y, torch.ones(1, 1), None)
    compare(g, **{"label_smoothing_ce_0.1": loss, "torch_ce_label_smoothing_0.1": loss})


def test_mixing_is_drawn_as_the_reference_draws():
    """Shares and moments of the draws, and for given box centres the reference's boxes."""
    g = golden("mixup")
    random = np.random.default_rng(0)
    draws = torch.stack([pixel_vit.draw_mix(random, 100, 0.8, 1.0) for _ in range(4000)])
    low, high = draws.flatten(1).aminmax(dim=1)
    mixed = (low > 0) & (high < 1)
    std, mean = torch.std_mean(low[mixed])
    found = {"frac_cutmix": 1 - mixed.float().mean(), "lam_mean_std_mixup": [mean, std]}
    compare(g, "stat_", atol=0.03, **found)
    given = mock.Mock()
    for b in (2, 4):
        given.beta.return_value = g[f"b{b}_lam_drawn"].item()
        found = []
        for place in np.ndindex(6, 6):
            given.integers.return_value = np.array(place)
            found.append(pixel_vit.draw_mix(given, 6, 0.0, 1.0))
        assert any(torch.equal(share, golden_share(g, b)) for share in found)


# ------------------------------------------------------------------------------ parity: diffusion


def dit(kind="pixel", heads=3):
    """Return the average of a golden checkpoint, which is saved as DiT's training does."""
    state = torch.load(FILES / f"dit_{kind}_ckpt.pt", weights_only=True)
    average = {f"module.{name}": x for name, x in state.items()}
    torch.save({"ema": average, "opt": {}, "args": argparse.Namespace()}, "dit.pt")
    return pixel_vit.load_model("dit.pt", heads)[0]


@pytest.mark.parametrize("name, kind, heads", [("dit1_", "pixel", 3), ("dit2_", "patch", 2)])
def test_dit(name, kind, heads):
    g = golden("dit")
    model = dit(kind, heads)
    x, t, y = (g[name + key] for key in "xty")
    time = model.t_embedder["mlp"](pixel_vit.timestep_embedding(t, 256))
    label = model.y_embedder["embedding_table"](y)
    tokens = model.x_embedder(common.patchify(x, model.patch)) + model.pos_embed
    block = model.blocks[0](tokens, time + label)
    compare(g, name, t_emb=time, y_emb=label, tokens0=tokens, tokens1=block)
    compare(g, name, out=torch.cat(model.predict(x, t, y), 1))
    x, t, y = (g[f"{name}cfg_{key}"][:2] for key in "xty")
    for scale in (1.5, 4.0):
        found = torch.cat(pixel_vit.guided(model, x, t, y, scale), 1)
        compare(g, f"{name}cfg_out_", at=slice(2), **{str(scale): found})
    found = pixel_vit.unpatchify(g[f"{name}unpatchify_in"], model.patch)
    compare(g, name, unpatchify_out=found)


def test_embeddings_of_time_and_label():
    g = golden("dit")
    for width in (8, 7, 256):
        found = pixel_vit.timestep_embedding(g.timestep_embedding_t, width)
        # t up to 1000 times a frequency whose last bit differs among machines
        compare(g, atol=1e-4, **{f"timestep_embedding_{width}": found})
    labels = g.label_drop_labels
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(int(g.label_drop_seed)))
    compare(g, label_drop_out=pixel_vit.drop_labels(labels, uniforms, 0.1, 10))
    forced = pixel_vit.drop_labels(labels, 1.0 - g.label_drop_forced_ids, 0.5, 10)
    compare(g, label_drop_forced_out=forced)
    found = pixel_vit.drop_labels(torch.tensor([-1, 3]), torch.ones(2), 0.1, 10)
    assert found.tolist() == [10, 3], "unknown labels are hidden too"


def test_an_untrained_dit_gives_zero():
    g = golden("dit")
    model = pixel_vit.build(Config(task="diffusion", image_size=4, classes=7))[0]
    assert not torch.cat(model.predict(g.dit1_x, g.dit1_t, g.dit1_y)).any()
    largest = model.blocks[0].attn.qkv.weight.abs().max()
    close(largest, math.sqrt(6 / 256), atol=0.01)  # Xavier uniform, 64 to 192


def test_diffusion_tables():
    g = golden("gaussian_diffusion")
    exactly = functools.partial(helpers.compare, g, rtol=1e-12)
    linear = pixel_vit.noise_betas("linear")
    tables = pixel_vit.diffusion_tables(linear, pixel_vit.space_timesteps(1000))
    # what the code computes from two tables where it needs them
    signal = tables["sqrt_alphas_cumprod"]
    tables["sqrt_recip_alphas_cumprod"] = 1 / signal
    tables["sqrt_recipm1_alphas_cumprod"] = tables["sqrt_one_minus_alphas_cumprod"] / signal
    exactly("lin1000/", **{name: table[g.t_index] for name, table in tables.items()})
    cosine = pixel_vit.noise_betas("cosine")
    cumulative = np.cumprod(1 - cosine)
    exactly("cos1000/", betas=cosine[g.t_index], alphas_cumprod=cumulative[g.t_index])
    steps = {str(count): pixel_vit.space_timesteps(count) for count in (250, 50, 10, 7, 1)}
    exactly("steps/1000/", **steps)
    tables = pixel_vit.diffusion_tables(linear, steps["10"])
    found = {name: table for name, table in tables.items() if f"resp10/{name}" in g}
    exactly("resp10/", timestep_map=steps["10"], **found)
    betas = pixel_vit.diffusion_tables(linear, steps["250"])["betas"]
    exactly("resp250/", betas_first5_last5=np.append(betas[:5], betas[-5:]))


def test_denoising_step():
    g = golden("gaussian_diffusion")
    d = Diffusion("linear")
    x = d.q_sample(g.x_start, g.t, g.noise)
    compare(g, q_sample=x, q_posterior_mean=d.posterior_mean(g.x_start, x, g.t))
    found = d.posterior_log_variance_clipped[g.t].flatten()
    compare(g, rtol=1e-6, q_posterior_log_variance=found)
    output = dit().predict(x, g.t, g.y)
    for clip, atol in ((False, 0.06), (True, 1e-4)):  # what is not clipped reaches 650
        mean, log_variance, x_start = d.denoise(*output, x, g.t, clip)
        prefix = f"p_mean_variance_clip{int(clip)}/"
        compare(g, prefix, atol=1e-4, mean=mean, log_variance=log_variance)
        compare(g, prefix, atol=atol, pred_xstart=x_start)
    found = pixel_vit.log_likelihood(g.x_start, 0.3 * g.noise, torch.tensor(-1.0))
    compare(g, rtol=1e-4, discretized_ll=found)


@pytest.mark.parametrize("variant, count, k", [("default", 1000, "t"), ("respaced", 10, "resp_t")])
def test_diffusion_loss(variant, count, k):
    g = golden("gaussian_diffusion")
    d = Diffusion("linear", count)
    model = dit().requires_grad_(True)
    model.diffusion = d
    k = g[k]
    x = d.q_sample(g.x_start, k, g.noise)
    output = model.predict(x, d.timestep_map[k], g.y)
    mse, bound = d.losses(*output, g.x_start, x, k, g.noise)
    prefix = f"loss_{variant}/"
    compare(g, prefix, rtol=1e-4, atol=1e-7, mse=mse, vb=bound)
    compare_loss(g, model, f"{prefix}loss", mse + bound, f"{prefix}gradnorm")
    assert model(g.x_start, g.y, k, g.noise) == (mse + bound).mean()


@pytest.mark.parametrize(
    "name, scale", [("sample_ddpm_noclip", 1), ("sample_ddpm_clip", 1), ("cfg_sample_full", 1.5)]
)
def test_sampler(name, scale):
    g = golden("gaussian_diffusion")
    model = dit()
    d = Diffusion("linear", 10)
    d.denoise = mock.Mock(wraps=d.denoise)
    noise = iter(g.sample_step_noise if scale == 1 else g.cfg_sample_step_noise[:, :2])

    def network(x, t):
        return pixel_vit.guided(model, x, t, g.sample_y, scale)

    clip = name != "sample_ddpm_noclip"
    sample = pixel_vit.sample_loop(d, network, g.sample_zT, lambda: next(noise), clip)
    atol = 1e-4 if clip else 0.06  # what is not clipped reaches 660
    compare(g, at=slice(2), atol=atol, **{name: sample})
    if name == "sample_ddpm_clip":
        calls = d.denoise.call_args_list
        samples = torch.stack([call.args[2] for call in calls[1:4]])
        starts = torch.stack([d.denoise(*call.args)[2] for call in calls[:3]])
        compare(g, "traj_ddpm_clip_", atol=1e-4, sample=samples, pred_xstart=starts)


def test_frechet_distance():
    g = golden("gen_metrics")
    distance = pixel_vit.frechet_distance(g.feat_real, g.feat_fake)
    compare(g, rtol=1e-8, atol=0.0, fd=distance, fd_scipy_sqrtm=distance)
    few = [x[: g.singular_n] for x in (g.feat_real, g.feat_fake)]
    compare(g, rtol=1e-5, atol=0.0, fd_singular=pixel_vit.frechet_distance(*few))


# ---------------------------------------------------------------------------------- own promises

TASKS = {
    "classify": "--task classify --randaugment 2 --mixup 0.8 --cutmix 1 --smoothing 0.1 "
    "--erase 0.5 --drop-path 0.3 --jitter 0.4 --grey 0.2 --permute 9",
    "diffusion": "--task diffusion --preset toy-diffusion --sampler-steps 4 --samples 12 "
    "--eval samples",
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_resume_and_run_on_two_ranks(task):
    """They end as in one go; samples are the same too. A checkpoint keeps the order of pixels."""
    flags = f"{SCRIPT.small} {TASKS[task]} --lr 1e-5 --lr-floor 1 --warmup 0 --steps"
    others = ("two", "sharded --shard")[: 1 + SHARDS]
    run_several(*(f"pixel_vit {flags} 4 --out {other}" for other in others), ranks=2)
    run(flags, "4 --out one")
    run(flags, "2 --out parts")
    run(flags, "4 --out parts --resume --workers 1")
    assert_same("one", "parts")
    for other in others:
        out = other.split()[0]
        assert_same("one", out, tolerance=1e-5)
        losses = [[row["loss"] for row in log_rows(name)[:4]] for name in ("one", out)]
        close(*losses, rtol=5e-5)
    if task == "classify":
        model, config = pixel_vit.load_model("one/last.pt")
        assert torch.equal(model.permutation, pixel_vit.pixel_permutation(config))
    else:
        one, two = (np.load(f"{name}/samples.npz") for name in ("one", "two"))
        close(two["arr_0"], one["arr_0"], atol=1)
        close(two["labels"], np.arange(12) % 10)


def test_samples_depend_on_seed_and_micro_batch():
    config = Config(task="diffusion", sampler_steps=5, image_size=4, classes=3)
    model = pixel_vit.build(config)[1]
    found = set()
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        samples = pixel_vit.sample_images(model, replace(config, seed=seed), number, common.World())
        found.add(samples.sum().item())
    assert len(found) == 3


def augmented(pixels, **fields):
    """Return 800 augmentations of pixels [3, S, S]: uint8 [800, 3, S, S]."""
    images = pixels.repeat(800, 1, 1, 1)
    return pixel_vit.Classifier.draw(Config(**fields), images, None, 0)[0]


def test_augmentation():
    """RandAugment leaves a quarter of the images alone; erasing keeps to its areas."""
    pixels = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    same = (augmented(pixels, randaugment=2) == pixels).flatten(1).all(1)
    assert 0.25 < same.float().mean() < 0.35  # some operations change nothing
    grey = augmented(pixels, grey=1.0)
    assert (grey == grey[:, :1]).all()
    pixels = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    erased = augmented(pixels, erase=1.0) != 128
    shares = erased.any(1).float().mean((1, 2))
    assert 0.01 < shares.min() and shares.max() < 0.36


def test_hue_turns_by_up_to_the_strength():
    """The paper's jitter of 0.4 is +-0.4 of the circle."""
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)
    pixels = augmented(red, jitter=0.4).flatten(1).tolist()
    hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in pixels])
    turns = hues - (hues > 0.5)
    close([turns.min(), turns.max()], [-0.4, 0.4], atol=0.02)


@pytest.mark.parametrize("pairs, distance", [(72, 1000), (20, 2)])
def test_pixels_trade_places(pairs, distance):
    """Each pixel moves once at most, and no farther than allowed."""
    config = Config(permute=pairs, permute_distance=distance, seed=1)
    order = pixel_vit.pixel_permutation(config)
    places = torch.arange(144)
    assert torch.equal(order[order], places)
    assert (order != places).sum() == 2 * pairs
    rows = places // 12 - order // 12
    columns = places % 12 - order % 12
    assert (rows.abs() + columns.abs()).max() <= distance


COUNTS = {
    "dit_xl2": 675_129_632,
    "dit_l2": 458_102_816,
    "dit_l1": 458_852_360,
    "mae_b16_finetune": 86_567_656,
    "vit_t1_cifar100": 5.56e6,
    "vit_s1_cifar100": 21.73e6,
    # MAE's encoders: ViT-B/16, ViT-L/16 and ViT-H/14 without head, 85.80, 303.30 and 630.76 M
    "mae_b16": 85_798_656,
    "mae_l16": 303_301_632,
    "mae_h14": 630_764_800,
}


def without_memory(preset):
    """Return a preset's network, whose weights take no memory."""
    classes = 100 if "cifar100" in preset else 1000
    config = Config(**{**pixel_vit.PRESETS[preset], "classes": classes})
    with torch.device("meta"):
        return pixel_vit.TASKS[config.task](config)


@pytest.mark.parametrize("preset, expected", COUNTS.items())
def test_parameters_are_those_of_the_paper(preset, expected):
    model = without_memory(preset)
    found = 0
    for name, p in model.named_parameters():
        found += p.numel() * (not name.startswith(("decoder", "mask")))
    assert found == pytest.approx(expected, abs=5e3 * isinstance(expected, float))
    fixed = preset in ("mae_b16", "mae_l16", "mae_h14", "dit_l2", "dit_xl2")
    assert model.pos_embed.requires_grad != fixed


def test_work_is_that_of_the_paper():
    """Multiply-adds of the specification's table; MAE counts visible tokens and the decoder."""
    works = {"vit_t1_cifar100": 10.3e9, "dit_l1": 360e9, "mae_t1_cifar100": 3.55e9}
    for preset, expected in works.items():
        assert without_memory(preset).work == pytest.approx(expected, rel=0.02)


# ----------------------------------------------------------------------------------- checkpoints


def test_mae_becomes_a_classifier():
    """The trunk is the MAE's, its fixed positions learn, the head starts at nearly nothing."""
    run(SCRIPT.small, "--steps 1 --positions sincos --out mae")
    run(SCRIPT.small, "--task classify --init mae/last.pt --steps 1 --lr 0 --out tuned")
    before, after = (weights(out)[1] for out in ("mae", "tuned"))
    for name in ("pos_embed", "blocks.1.mlp.fc1.weight", "cls_token"):
        assert torch.equal(before[f"model.{name}"], after[f"model.{name}"])
    head = after["model.head.weight"]
    assert head.abs().max() < 1e-4 and head.any() and "model.norm.weight" not in after
    assert pixel_vit.load_model("tuned/last.pt")[1].positions == "learned"


def test_official_checkpoints_in_results_out():
    """The Hub's encoder of an MAE gives features, a DiT gives samples."""
    hub = GOLDEN / "hub" / "mae" / "model.safetensors"
    g = golden_tensors("hub/mae", "expected")
    compare(g, tokens=pixel_vit.load_model(hub, heads=2)[0].tokens(g.images))
    flags = "--no-train --device cpu --workers 0 --init"
    run(flags, hub, "--heads 2 --eval features --out features")
    assert np.load("features/features.npz")["features"].shape == (2000, 24)
    run(flags, FILES / "dit_pixel_ckpt.pt", "--heads 3 --samples 3 --sampler-steps 3 --out dit")
    assert np.load("dit/samples.npz")["arr_0"].shape == (3, 4, 4, 3)


class Codec(torch.nn.Module):
    """A stand-in for a frozen autoencoder: 2 x 2 pixels become 12 channels."""

    @torch.jit.export
    def encode(self, images):
        return F.pixel_unshuffle(images, 2)

    @torch.jit.export
    def decode(self, latents):
        return F.pixel_shuffle(latents, 2)


def test_diffusion_in_latents_judged_by_a_classifier(capsys):
    torch.jit.script(Codec()).save("codec.ts")
    run(SCRIPT.small, "--task classify --steps 1 --out judge")
    flags = f"{SCRIPT.small} {TASKS['diffusion']} --channels 12 --downsample 2 --steps 2"
    flags += " --judge judge/last.pt --codec"
    run(flags, "codec.ts --out latent")
    results = log_rows("latent")[-1]["eval"]
    assert results.keys() == {"real", "samples", "untrained"}
    for result in results.values():
        assert math.isfinite(result["frechet"]) and "asked class, %" in result
    assert "TorchScript" in refused(capsys, SCRIPT, flags, "absent --out wrong")


def test_classifier_needs_labels_and_diffusion_does_not(capsys):
    data = photographs(Path("flat"), count=16, splits=".", classes=".")
    flags = f"{SCRIPT.small} --data {data} --steps 2 --out out --task"
    assert "train/CLASS" in refused(capsys, SCRIPT, flags, "classify")
    run(flags, "diffusion")


# -------------------------------------------------------------------------------------- learning

HUES = np.random.default_rng(0).uniform(20, 235, (10, 3))
QUICK = "--image-size 6 --device cpu --no-compile --no-flip --out learnt"


@pytest.fixture
def halves(monkeypatch):
    """Replace the toy by one learnt in seconds: the colour of the left half is the class."""

    def toy(name):
        random, labels = common.toy_random(name)
        right = random.uniform(0, 255, (len(labels), 3))
        columns = np.repeat([HUES[labels], right], 3, axis=0)  # [6, N, 3]
        images = random.normal(columns, 10, (6, *columns.shape))  # [6, 6, N, 3]
        return common.in_memory(np.moveaxis(images, 2, 0), labels, list("0123456789"), name)

    monkeypatch.setitem(common.TOYS, "mosaics", toy)


def test_classifier_learns(halves):
    """In ten seconds: the half that matters is told from the other by learned positions."""
    run(QUICK, "--steps 200 --eval accuracy")
    assert log_rows("learnt")[-1]["eval"]["trained"]["top-1"] > 80


def test_mae_learns(halves):
    """In 20 seconds: hidden pixels are painted better than by the mean colour."""
    run(QUICK, "--preset toy-mae --steps 400 --eval reconstruction")
    result = log_rows("learnt")[-1]["eval"]["trained"]
    assert result["hidden error x 100"] < 0.2 * result["of mean colour"]


def test_diffusion_learns(halves):
    """In 20 seconds: samples have the colour of the class that was asked for."""
    run(QUICK, "--preset toy-diffusion --steps 300 --ema 0.98 --samples 96")
    file = np.load("learnt/samples.npz")
    left = file["arr_0"][:, :, :3].mean((1, 2))  # [96, 3]
    taken = np.linalg.norm(left[:, None] - HUES, axis=2).argmin(1)
    assert (taken == file["labels"]).mean() > 0.5
