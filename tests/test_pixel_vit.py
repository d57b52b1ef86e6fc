"""pixel_vit.py against the numbers of MAE, DiT and timm (tests/golden/pixel_vit), and its promises.

What all scripts promise is in test_runs.py, where this one runs as a masked autoencoder.
"""

import argparse
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, golden_tensors, log_rows, norms, run_several
from PIL import Image
from test_runs import SCRIPTS, assert_same, here, photographs, refused, weights

import common
import pixel_vit
from pixel_vit import Config, Diffusion

SCRIPT = SCRIPTS["pixel_vit"]
FILES = GOLDEN / "pixel_vit"
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "pixel_vit")
compare = functools.partial(helpers.compare, atol=1e-5)


def near(g, prefix="", **found):
    """Assert that values differ from golden ones by no more than a share of the largest."""
    for name, value in found.items():
        largest = g[prefix + name].abs().max().item()
        compare(g, prefix, atol=1e-4 * largest, **{name: value})


def compare_loss(g, model, name, loss, gradients):
    """Compare a loss with golden[name], and the norms of its gradients with golden[gradients]."""
    model.zero_grad()
    loss.mean().backward(retain_graph=True)
    found = {name: loss, gradients: norms(model, g.gradnorm_names, gradients=True)}
    compare(g, rtol=1e-4, atol=1e-9, **found)


# ------------------------------------------------------------------ parity: classifier and MAE


def classifier(readout="gap", **changes):
    """Return the golden ViT on 6 x 6 pixels; its cls variant uses fc_norm as norm."""
    shape = {"image_size": 6, "width": 12, "depth": 2, "heads": 3, "classes": 5}
    model = pixel_vit.build(Config(readout=readout, **shape, **changes))[0]
    state = torch.load(FILES / "vit_pixel_ckpt.pth", weights_only=True)["model"]
    if readout == "cls":
        state = {k.replace("fc_norm", "norm"): v for k, v in state.items()}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("readout", ["gap", "cls"])
def test_classifier(readout):
    g = golden("vit_pixel")
    model = classifier(readout)
    compare(
        g,
        f"{readout}_",
        features=model.pooled(g.imgs),
        logits=model.logits(g.imgs),
    )
    scales = torch.ones(2, 2, len(g.imgs), 1, 1)
    loss = model(g.imgs, g.labels, torch.ones(1, 1), scales)
    compare_loss(g, model, f"{readout}_ce", loss, f"{readout}_gradnorm")
    model.norm = torch.nn.Identity()
    compare(g, gap_tokens_prenorm=model.tokens(g.imgs))


def test_pixels_in_another_order():
    """Permuted pixels change the output, positions permuted alike change it back."""
    g = golden("vit_pixel")
    model = classifier()
    positions = model.pos_embed.data
    model.permutation = g.perm
    compare(g, perm_logits_learned_pe=model.logits(g.imgs))
    positions[:, 1:] = positions[:, 1:][:, g.perm]
    logits = model.logits(g.imgs)
    compare(g, perm_logits_perm_pe=logits, gap_logits=logits)
    positions.zero_()
    compare(g, nope_logits_perm=model.logits(g.imgs))
    model.permutation = None
    compare(g, nope_logits=model.logits(g.imgs))


@pytest.mark.parametrize("kind, heads, patch", [("patch", 2, 2), ("pixel", 3, 1)])
def test_mae(kind, heads, patch):
    g = golden(f"mae_{kind}")
    model, config = pixel_vit.load_model(FILES / f"mae_{kind}_ckpt.pth", heads, decoder_heads=2)
    model.requires_grad_(True)
    assert (config.task, config.patch) == ("mae", patch)
    keep, restore, mask = pixel_vit.random_masking(g.noise, float(g.mask_ratio))
    compare(g, ids_keep=keep, ids_restore=restore, mask=mask)
    prediction, _ = model.paint(g.imgs, g.noise)
    compare(
        g,
        latent=model.tokens(g.imgs, keep),
        latent_mask0=model.tokens(g.imgs, g.noise.argsort(1)),
        plain_tokens_norm=model.tokens(g.imgs),
        pred=prediction,
        patchify=pixel_vit.patchify(g.imgs, patch),
        unpatchify_of_pred=pixel_vit.unpatchify(prediction, patch),
    )
    for name, norm_pix in (("", False), ("_normpix", True)):
        model.norm_pix = norm_pix
        loss = model(g.imgs, g.noise)
        compare_loss(g, model, f"loss{name}", loss, f"gradnorm{name}")
    model.norm = torch.nn.Identity()
    compare(g, plain_tokens_prenorm=model.tokens(g.imgs))


def test_masking_counts_and_frequencies():
    g = golden("misc_masking")
    kept = [pixel_vit.kept_tokens(int(n), ratio) for n, ratio, _ in g.len_keep_table.tolist()]
    close(kept, g.len_keep_table[:, 2].clamp(min=1))
    noise = torch.rand(2000, 64, generator=torch.Generator().manual_seed(1238))
    mask = pixel_vit.random_masking(noise, 0.75)[2]
    compare(g, keep_fraction_per_position=1 - mask.mean(0))


def test_position_tables():
    g = golden("pos_embed")
    for name in (n for n in g if n[:4] in ("mae_", "dit_")):
        width, grid = (int(part[1:]) for part in name.split("_")[1:])
        config = Config(positions="sincos", image_size=grid)
        table = pixel_vit.make_positions(config, width, special=int(name.startswith("mae")))
        compare(g, **{name: table[0]})
        assert not table.requires_grad
    compare(g, interp_out=common.interpolate_positions(g.interp_in, (6, 6)))
    learned = pixel_vit.make_positions(Config(positions="learned", image_size=20), 64, special=1)
    assert learned.requires_grad and abs(learned.std().item() - 0.02) < 1e-3
    assert not pixel_vit.make_positions(Config(positions="none"), 64).any()


# --------------------------------------------------------------------------- parity: optimisation


def test_learning_rate_schedule():
    g = golden("lr_schedule")
    peak = g.arg_lr.item()
    config = Config(lr=peak, lr_floor=g.arg_min_lr.item() / peak, warmup=5 / 40)
    steps = (100_000 * g.epoch).round().tolist()
    found = [pixel_vit.learning_rate(config, step, 4_000_000) for step in steps]
    compare(g, rtol=1e-5, atol=1e-12, lr=found)
    constant = replace(config, lr_floor=1.0, warmup=0.1)
    found = [pixel_vit.learning_rate(constant, step, 1000) for step in (50, 900)]
    close(found, [peak / 2, peak], rtol=1e-9)


def test_layers_learn_at_their_own_rate():
    g = golden("layer_decay")
    model = classifier()
    assert set(g.names) == {name for name, _ in model.named_parameters()}
    rest = (int(g.depth), g.layer_decay.item(), model.undecayed)
    dimensions = [model.get_parameter(name).dim() for name in g.names]
    rules = map(lambda *of: pixel_vit.parameter_rule(*of, *rest), g.names, dimensions)
    scales, decayed = zip(*rules, strict=True)
    compare(g, atol=1e-9, lr_scale=scales)
    close(scales, g.layer_decay ** (g.depth + 1 - g.layer_id), atol=1e-9)
    close(decayed, g.weight_decay > 0)
    assert pixel_vit.parameter_rule("cls_token", 3, 2, 1.0)[1], "MAE decays its tokens"


def test_average_of_weights():
    g = golden("ema")
    source, target = (torch.nn.Linear(3, 2, bias=False) for _ in range(2))
    target.weight.data = g.ema0_w
    ema = common.EMA(target, source)
    for i, momentum in enumerate((0.9999, 0.9999, 0.9)):
        source.weight.data.copy_(g.model_w_seq[i])
        ema.update(momentum, torch.ones(()))
        compare(g, **{f"ema{i + 1}_w": target.weight})


def test_stochastic_depth(monkeypatch):
    g = golden("drop_path")
    p = g.p.item()
    torch.manual_seed(int(g.seed))
    kept = torch.empty(16).bernoulli_(1 - p)
    pixels = torch.zeros(16, 3, 1, 1, dtype=torch.uint8)
    config = Config(image_size=1, depth=2, width=8, heads=2, classes=2, drop_path=p)
    with monkeypatch.context() as patch:  # the last block's rate is p
        uniforms = kept.view(16, 1, 1)
        patch.setattr(torch, "rand", lambda *shape, **_: uniforms.expand(shape))
        scales = pixel_vit.Classifier.draw(config, pixels, None, 0)[3]
    compare(g, out_of_ones=scales[1, 0] * torch.ones(16, 3, 2))
    config = replace(config, depth=12, drop_path=0.1)
    pixels = pixels.repeat(200, 1, 1, 1)
    scales = pixel_vit.Classifier.draw(config, pixels, None, 0)[3]
    assert scales.shape == (12, 2, 3200, 1, 1)
    scales = scales.flatten(1)
    rates = g.linspace_rates_depth12_rate0p1
    close(scales.amax(1), 1 / (1 - rates), atol=1e-6)
    close((scales == 0).float().mean(1), rates, atol=0.015)
    block = pixel_vit.build(config)[0].blocks[-1]
    x = torch.randn(2, 5, 8)
    scales = torch.tensor([[0.0, 2.0], [0.0, 0.0]])  # what is left of the two branches
    second = x[1] + 2 * block.attn(block.norm1(x))[1]
    out = block(x, scales[..., None, None])
    close(out, torch.stack([x[0], second]), atol=1e-6)


def test_linear_probe():
    g = golden("linprobe")
    for decay in (0.0, 0.01):
        weight, bias = (torch.nn.Parameter(g[name].clone()) for name in ("w0", "b0"))
        groups = [{"params": [weight], "weight_decay": decay}]
        groups += [{"params": [bias], "weight_decay": 0.0}]
        optimizer = pixel_vit.LARS([{**group, "lr": 0.5} for group in groups], momentum=0.9)
        for step in range(3):
            weight.grad = g.grad_w[step].clone()
            bias.grad = g.grad_b[step].clone()
            optimizer.step()
            compare(g, f"wd{decay}_step{step}_", rtol=1e-5, atol=1e-7, w=weight, b=bias)
    head = pixel_vit.probe_head(g.feat.shape[1], len(g.head_b))
    head[1].load_state_dict({"weight": g.head_w, "bias": g.head_b})
    compare(g, train_out=head(g.feat))
    statistics = {"running_mean": head[0].running_mean, "running_var": head[0].running_var}
    compare(g, atol=1e-6, **statistics)
    compare(g, eval_out_after_one_step=head.eval()(g.feat))


# --------------------------------------------------------------------------- parity: augmentation


def test_operations_of_randaugment():
    """At level 9, with either sign, as timm calls PIL: the same pixels."""
    g = golden("randaugment_ops")
    image = Image.fromarray(g.img.numpy())
    assert len(g.names) == len(pixel_vit.OPERATIONS)
    for name in g.names:
        ours = name.replace("Increasing", "").replace("Rel", "")
        operation = pixel_vit.OPERATIONS[ours.lower()]
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
    model = classifier(smoothing=0.1)
    model.logits = lambda images, scales: g.logits
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
    compare(g, atol=0.03, stat_frac_cutmix=1 - mixed.float().mean())
    compare(g, atol=0.03, stat_lam_mean_std_mixup=[mean, std])
    for b in (2, 4):
        given = SimpleNamespace(beta=lambda *_, b=b: g[f"b{b}_lam_drawn"].item())
        found = []
        for place in np.ndindex(6, 6):
            given.integers = lambda *_, place=place: np.array(place)
            found.append(pixel_vit.draw_mix(given, 6, 0.0, 1.0))
        assert any(torch.equal(share, golden_share(g, b)) for share in found)


# ------------------------------------------------------------------------------ parity: diffusion


def dit(kind="pixel", heads=3):
    """Return (model, Config) of a golden checkpoint."""
    return pixel_vit.load_model(FILES / f"dit_{kind}_ckpt.pt", heads)


SHAPES = {  # classes, image size, channels
    "dit1_": ("pixel", 3, (7, 4, 3)),
    "dit2_": ("patch", 2, (5, 48, 4)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_dit(name):
    g = golden("dit")
    kind, heads, shape = SHAPES[name]
    model, config = dit(kind, heads)
    assert (config.classes, config.image_size, config.channels) == shape
    assert config.task == "diffusion"
    x, t, y = (g[name + key] for key in "xty")
    time = model.t_embedder["mlp"](pixel_vit.timestep_embedding(t, 256))
    label = model.y_embedder["embedding_table"](y)
    tokens = model.x_embedder(common.patchify(x, config.patch)) + model.pos_embed
    block = model.blocks[0](tokens, time + label)
    compare(g, name, t_emb=time, y_emb=label, tokens0=tokens, tokens1=block)
    compare(g, name, out=torch.cat(model.predict(x, t, y), 1))
    x, t, y = (g[f"{name}cfg_{key}"][:2] for key in "xty")
    for scale in (1.5, 4.0):
        found = torch.cat(pixel_vit.guided(model, x, t, y, scale), 1)
        compare(g, f"{name}cfg_out_", at=slice(2), **{str(scale): found})
    tokens = g[f"{name}unpatchify_in"]
    compare(g, name, unpatchify_out=pixel_vit.unpatchify(tokens, config.patch))


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
    unknown = pixel_vit.drop_labels(torch.tensor([-1, 3]), torch.ones(2), 0.1, 10)
    assert unknown.tolist() == [10, 3]


def test_an_untrained_dit_gives_zero():
    g = golden("dit")
    shape = {"image_size": 4, "width": 16, "depth": 2, "heads": 2, "classes": 7}
    model = pixel_vit.build(Config(task="diffusion", **shape))[0]
    out = model.predict(g.dit1_x, g.dit1_t, g.dit1_y)
    assert not torch.cat(out).any()
    largest = model.blocks[0].attn.qkv.weight.abs().max()
    close(largest, math.sqrt(6 / 64), atol=0.01)  # Xavier uniform


def test_diffusion_tables():
    g = golden("gaussian_diffusion")
    compare_exactly = functools.partial(compare, atol=0.0, rtol=1e-12)
    betas = pixel_vit.noise_betas("linear")
    linear = pixel_vit.diffusion_tables(betas, pixel_vit.space_timesteps(1000))
    # what the code computes from two tables where it needs them
    signal, noise = (linear[f"sqrt_{name}alphas_cumprod"] for name in ("", "one_minus_"))
    linear["sqrt_recip_alphas_cumprod"] = 1 / signal
    linear["sqrt_recipm1_alphas_cumprod"] = noise / signal
    compare_exactly(g, "lin1000/", **{name: x[g.t_index] for name, x in linear.items()})
    cosine = pixel_vit.noise_betas("cosine")
    found = {"betas": cosine[g.t_index], "alphas_cumprod": np.cumprod(1 - cosine)[g.t_index]}
    compare_exactly(g, "cos1000/", **found)
    found = {str(count): pixel_vit.space_timesteps(count) for count in (250, 50, 10, 7, 1)}
    compare_exactly(g, "steps/1000/", **found)
    steps = pixel_vit.space_timesteps(int(g.resp))
    ten = pixel_vit.diffusion_tables(betas, steps)
    found = {name: x for name, x in ten.items() if f"resp10/{name}" in g}
    compare_exactly(g, "resp10/", timestep_map=steps, **found)
    spaced = pixel_vit.diffusion_tables(betas, pixel_vit.space_timesteps(250))["betas"]
    compare_exactly(g, "resp250/", betas_first5_last5=np.append(spaced[:5], spaced[-5:]))


def test_denoising_step():
    g = golden("gaussian_diffusion")
    d = Diffusion("linear")
    x = d.q_sample(g.x_start, g.t, g.noise)
    compare(g, q_sample=x)
    near(g, q_posterior_mean=d.posterior_mean(g.x_start, x, g.t))
    found = d.posterior_log_variance_clipped[g.t].flatten()
    compare(g, rtol=1e-6, q_posterior_log_variance=found)
    output = dit()[0].predict(x, g.t, g.y)
    for clip in (False, True):
        mean, log_variance, x_start = d.denoise(*output, x, g.t, clip)
        found = {"mean": mean, "log_variance": log_variance, "pred_xstart": x_start}
        near(g, f"p_mean_variance_clip{int(clip)}/", **found)
    found = pixel_vit.log_likelihood(g.x_start, 0.3 * g.noise, torch.tensor(-1.0))
    compare(g, rtol=1e-4, discretized_ll=found)


@pytest.mark.parametrize("variant", ["default", "respaced"])
def test_diffusion_loss(variant):
    g = golden("gaussian_diffusion")
    default = variant == "default"
    d = Diffusion("linear", 1000 if default else 10)
    model, _ = dit()
    model.requires_grad_(True)
    k = g.t if default else g.resp_t
    x = d.q_sample(g.x_start, k, g.noise)
    output = model.predict(x, d.timestep_map[k], g.y)
    mse, bound = d.losses(*output, g.x_start, x, k, g.noise)
    prefix = f"loss_{variant}/"
    compare(g, prefix, rtol=1e-4, atol=1e-7, mse=mse, vb=bound)
    compare_loss(g, model, f"{prefix}loss", mse + bound, f"{prefix}gradnorm")
    if default:
        assert model(g.x_start, g.y, k, g.noise) == (mse + bound).mean()


@pytest.mark.parametrize("name", ["sample_ddpm_noclip", "sample_ddpm_clip", "cfg_sample_full"])
def test_sampler(name):
    g = golden("gaussian_diffusion")
    d = Diffusion("linear", 10)
    model, _ = dit()
    guided = name == "cfg_sample_full"
    scale = g.cfg_sample_scale.item() if guided else 1.0
    noise = iter(g.cfg_sample_step_noise[:, :2] if guided else g.sample_step_noise)
    seen = []  # what the network is given and returns, step by step

    def network(x, t):
        seen.append((x, pixel_vit.guided(model, x, t, g.sample_y, scale)))
        return seen[-1][1]

    clip = name != "sample_ddpm_noclip"
    sample = pixel_vit.sample_loop(d, network, g.sample_zT, lambda: next(noise), clip)
    near({name: g[name][:2]}, **{name: sample})
    if name == "sample_ddpm_clip":
        given, outputs = zip(*seen[:4], strict=True)
        near(g, traj_ddpm_clip_sample=torch.stack(given[1:]))
        starts = []
        for i in range(3):
            k = torch.full((2,), 9 - i)
            starts.append(d.denoise(*outputs[i], given[i], k, clip=True)[2])
        near(g, traj_ddpm_clip_pred_xstart=torch.stack(starts))


def test_frechet_distance():
    g = golden("gen_metrics")
    distance = pixel_vit.frechet_distance(g.feat_real, g.feat_fake)
    compare(g, rtol=1e-8, atol=0.0, fd=distance, fd_scipy_sqrtm=distance)
    n = int(g.singular_n)
    few = pixel_vit.frechet_distance(g.feat_real[:n], g.feat_fake[:n])
    compare(g, rtol=1e-5, atol=0.0, fd_singular=few)


# ---------------------------------------------------------------------------------- own promises

TASKS = {
    "classify": "--task classify --randaugment 2 --mixup 0.8 --cutmix 1 --smoothing 0.1 "
    "--erase 0.5 --drop-path 0.3 --jitter 0.4 --grey 0.2",
    "diffusion": "--task diffusion --preset toy-diffusion --sampler-steps 4 --samples 12 "
    "--eval samples",
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_resume_and_run_on_two_ranks(task):
    """They end as in one go; samples are the same too."""
    flags = f"{SCRIPT.small} {TASKS[task]} --lr 1e-5 --lr-floor 1 --warmup 0 --steps"
    line = f"pixel_vit {flags} 4 --out"
    run_several(f"{line} two", f"{line} sharded --shard", ranks=2)
    run(flags, "4 --out one")
    run(flags, "2 --out parts")
    run(flags, "4 --out parts --resume --workers 1")
    assert_same("one", "parts")
    losses = [row["loss"] for row in log_rows("one")[:4]]
    for other in ("two", "sharded"):
        assert_same("one", other, tolerance=1e-5)
        close([row["loss"] for row in log_rows(other)[:4]], losses, rtol=5e-5)
    if task == "diffusion":
        one, two = (np.load(f"{name}/samples.npz") for name in ("one", "two"))
        assert one["arr_0"].shape == (12, 8, 8, 3)
        close(two["arr_0"], one["arr_0"], atol=1)
        for samples in (one, two):
            assert samples["labels"].tolist() == [i % 10 for i in range(12)]


def test_samples_come_in_micro_batches():
    """A sample depends on the seed and its micro-batch only; classes take turns."""
    shape = {"image_size": 4, "width": 16, "depth": 2, "heads": 2, "classes": 3}
    config = Config(task="diffusion", sampler_steps=5, micro=4, samples=10, **shape)
    world = common.World()
    model = pixel_vit.build(config)[1]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    split = pixel_vit.sample_split(model, config, world, None)
    assert split.labels.tolist() == [i % 3 for i in range(10)]
    second = pixel_vit.sample_images(model, config, 1, world)
    close(np.stack(split.images[4:8]), second.permute(0, 2, 3, 1))
    other = pixel_vit.sample_images(model, replace(config, seed=1), 1, world)
    assert (other.int() - second).abs().float().mean() > 5
    given = []
    model.predict = lambda x, t, labels: given.append(labels) or (x, x)
    pixel_vit.sample_images(model, config, 1, world)
    assert given[0].tolist() == [1, 2, 0, 1] + 4 * [3], "the last four are guided by no class"


def test_augmentation():
    """RandAugment leaves a quarter of the images alone; erasing keeps to its areas."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))

    def changed(**fields):
        return np.asarray(pixel_vit.augment(image, Config(**fields), random))

    same = [np.array_equal(changed(randaugment=2), image) for _ in range(800)]
    assert 0.25 < np.mean(same) < 0.35  # some operations change nothing
    assert np.array_equal(changed(), image)
    grey = changed(grey=1.0)
    assert (grey == grey[..., :1]).all()
    pixels = torch.full((300, 3, 32, 32), 128, dtype=torch.uint8)
    for erased in pixels:
        pixel_vit.erase(erased, random)
    shares = (pixels != 128).any(1).float().mean((1, 2))
    assert 0.01 < shares.min() and shares.max() < 0.36


def test_hue_turns_by_up_to_the_strength():
    """The paper's jitter of 0.4 is +-0.4 of the circle."""
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    random = np.random.default_rng(0)
    green = pixel_vit.shift_hue(red, 1 / 3)
    close(green.getpixel((0, 0)), [0, 255, 0], atol=12)
    turns = []
    for _ in range(400):
        image = pixel_vit.augment(red, Config(jitter=0.4), random)
        hue = image.convert("HSV").getpixel((0, 0))[0] / 255
        turns.append(hue - (hue > 0.5))
    close([min(turns), max(turns)], [-0.4, 0.4], atol=0.02)


def test_pixels_trade_places():
    """Each pixel moves once at most, and no farther than allowed. A checkpoint keeps the order."""
    places = torch.arange(144)
    for pairs, distance in {0: 1000, 5: 1000, 72: 1000, 20: 2}.items():
        config = Config(image_size=12, permute=pairs, permute_distance=distance, seed=1)
        order = pixel_vit.pixel_permutation(config)
        assert torch.equal(order[order], places)
        moved = (order != places).nonzero()[:, 0]
        assert len(moved) == 2 * pairs
        rows = moved // 12 - order[moved] // 12
        columns = moved % 12 - order[moved] % 12
        assert (rows.abs() + columns.abs() <= distance).all()
    run(SCRIPT.small, "--task classify --steps 1 --permute 9 --out permuted")
    model, config = pixel_vit.load_model("permuted/last.pt")
    assert torch.equal(model.permutation, pixel_vit.pixel_permutation(config))
    assert (model.permutation != torch.arange(64)).sum() == 18


COUNTS = {  # preset: classes, parameters
    "dit_xl2": (1000, 675_129_632),
    "dit_l2": (1000, 458_102_816),
    "dit_l1": (1000, 458_852_360),
    "mae_b16_finetune": (1000, 86_567_656),
    "vit_t1_cifar100": (100, 5.56e6),
    "vit_s1_cifar100": (100, 21.73e6),
    # MAE's encoders: ViT-B/16, ViT-L/16 and ViT-H/14 without head, 85.80, 303.30 and 630.76 M
    "mae_b16": (1000, 85_798_656),
    "mae_l16": (1000, 303_301_632),
    "mae_h14": (1000, 630_764_800),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameters_are_those_of_the_paper(preset):
    classes, expected = COUNTS[preset]
    config = Config(**{**pixel_vit.PRESETS[preset], "classes": classes})
    with torch.device("meta"):
        model = pixel_vit.TASKS[config.task](config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    decoder = [name for name in sizes if name.startswith(("decoder", "mask"))]
    found = sum(sizes.values()) - sum(map(sizes.get, decoder))
    assert found == pytest.approx(expected, abs=5e3 * isinstance(expected, float))
    fixed = preset in ("mae_b16", "mae_l16", "mae_h14", "dit_l2", "dit_xl2")
    assert model.pos_embed.requires_grad != fixed
    if preset == "mae_b16_finetune":
        assert all(p.requires_grad for p in model.parameters())
        rule = pixel_vit.parameter_rule("pos_embed", 3, 12, config.layer_decay, model.undecayed)
        assert rule == (pytest.approx(0.65**13), False)


def test_work_is_that_of_the_paper():
    """Multiply-adds of the specification's table; MAE counts visible tokens and the decoder."""
    tiny = Config(image_size=32, classes=100, **pixel_vit.TINY)
    large = Config(image_size=256, downsample=8, channels=4, **pixel_vit.LARGE)
    mae = Config(image_size=32, decoder_width=128, decoder_depth=4, **pixel_vit.TINY)
    with torch.device("meta"):
        works = [pixel_vit.Classifier(tiny).work, pixel_vit.DiT(large).work]
        painting = pixel_vit.MAE(mae).work
    close(works, [10.3e9, 360e9], rtol=0.02)
    encoder = 12 * (12 * 257 * 192**2 + 2 * 257**2 * 192)
    assert painting == encoder + 4 * (12 * 1025 * 128**2 + 2 * 1025**2 * 128)


# ----------------------------------------------------------------------------------- checkpoints


def test_mae_becomes_a_classifier(monkeypatch):
    """Pretrain, then tune: the trunk is the MAE's, the head starts at nearly nothing."""
    run(SCRIPT.small, "--steps 1 --positions sincos --out mae")
    flags = "--task classify --init mae/last.pt --steps 1 --lr 0 --eval accuracy --out"
    run(SCRIPT.small, flags, "tuned")
    before, after = (weights(out)[1] for out in ("mae", "tuned"))
    for name in ("pos_embed", "blocks.1.mlp.fc1.weight", "cls_token"):
        assert torch.equal(before[f"model.{name}"], after[f"model.{name}"])
    head = after["model.head.weight"]
    assert head.abs().max() < 1e-4 and head.any() and "model.norm.weight" not in after
    assert "top-1" in log_rows("tuned")[-1]["eval"]["trained"]
    monkeypatch.setitem(pixel_vit.PRESETS, "toy", {**pixel_vit.PRESETS["toy"], "steps": 2})
    run(
        SCRIPT.small, "--preset toy --task classify --init mae/last.pt --out untyped"
    )  # the preset's length
    step, after = weights("untyped")
    assert step == 2
    assert not torch.equal(after["model.pos_embed"], before["model.pos_embed"]), "it is trained too"


def test_official_checkpoints_with_arguments_and_other_heads():
    """MAE's files of pretraining and training (with a Namespace), DiT's with `ema` and prefixes."""
    state = torch.load(FILES / "mae_pixel_ckpt.pth", weights_only=True)["model"]
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, "encoder.pth")
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, "training.pth")
    g = golden("mae_pixel")
    for path in ("encoder.pth", "training.pth"):
        model, _ = pixel_vit.load_model(path, heads=3)
        compare(g, plain_tokens_norm=model.tokens(g.imgs))
    model, _ = pixel_vit.load_model("encoder.pth", heads=3, task="classify", classes=5)
    compare(g, plain_tokens_prenorm=model.tokens(g.imgs))
    state = torch.load(FILES / "dit_pixel_ckpt.pt", weights_only=True)
    state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"ema": state, "opt": {}, "args": argparse.Namespace()}, "dit.pt")
    model, _ = pixel_vit.load_model("dit.pt", heads=3)
    g = golden("dit")
    output = model.predict(g.dit1_x, g.dit1_t, g.dit1_y)
    compare(g, dit1_out=torch.cat(output, 1))
    flags = "--no-train --device cpu --heads 3 --workers 0"
    run(flags, "--init dit.pt --samples 3 --sampler-steps 3 --out sampled")
    assert np.load("sampled/samples.npz")["arr_0"].shape == (3, 4, 4, 3)
    run(flags, "--init encoder.pth --eval features --out features")
    assert np.load("features/features.npz")["features"].shape == (2000, 12)
    with pytest.raises(SystemExit):
        pixel_vit.load_model("encoder.pth")  # 12 channels: how many heads?


def test_the_hubs_encoder():
    g = golden_tensors("hub/mae", "expected")
    path = GOLDEN / "hub" / "mae" / "model.safetensors"
    model, config = pixel_vit.load_model(path, heads=2)
    assert (config.image_size, config.patch, config.depth) == (32, 8, 3)
    compare(g, tokens=model.tokens(g.images))


class Codec(torch.nn.Module):
    """A stand-in for a frozen autoencoder: 2 x 2 averages and a fourth channel."""

    @torch.jit.export
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        small = F.avg_pool2d(images, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)

    @torch.jit.export
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_diffusion_in_latents_judged_by_a_classifier(capsys):
    torch.jit.script(Codec()).save("codec.ts")
    run(SCRIPT.small, "--task classify --steps 1 --out judge")
    flags = f"{SCRIPT.small} {TASKS['diffusion']} --channels 4 --downsample 2 --steps 2"
    flags += " --judge judge/last.pt --codec"
    run(flags, "codec.ts --out latent")
    results = log_rows("latent")[-1]["eval"]
    assert {"real", "samples", "untrained"} <= results.keys()
    for result in results.values():
        assert math.isfinite(result["frechet"]) and "asked class, %" in result
    assert weights("latent")[1]["model.x_embedder.proj.weight"].shape == (16, 4, 1, 1)
    assert "TorchScript" in refused(capsys, SCRIPT, flags, "absent --out wrong")


def test_classifier_needs_labels_and_diffusion_does_not(tmp_path, capsys):
    data = photographs(tmp_path / "flat", count=16, splits=".", classes=".")
    flags = f"{SCRIPT.small} --data {data} --steps 2 --out out --task"
    assert "train/CLASS" in refused(capsys, SCRIPT, flags, "classify")
    run(flags, "diffusion")
    assert weights("out")[1]["model.y_embedder.embedding_table.weight"].shape == (1, 16)


# -------------------------------------------------------------------------------------- learning

HUES = np.random.default_rng(0).uniform(20, 235, (10, 3))
QUICK = "--image-size 6 --device cpu --no-compile --precision fp32 --workers 0 --no-flip "
QUICK += "--out learnt "


@pytest.fixture
def halves(monkeypatch):
    """A toy learnt in seconds: two halves in noise. The left one's colour is the class."""

    def toy(name):
        random, labels = common.toy_random(name)
        right = random.uniform(0, 255, (len(labels), 3))
        images = np.stack([HUES[labels], right], axis=1).repeat(3, 1)  # [N, 6, 3]
        images = images[:, None].repeat(6, 1)
        images = random.normal(images, 10)
        return common.in_memory(images, labels, list("0123456789"), name)

    monkeypatch.setitem(common.TOYS, "mosaics", toy)


@pytest.mark.usefixtures("halves")
def test_classifier_learns():
    """In ten seconds: the half that matters is told from the other by learned positions."""
    run(QUICK, "--steps 200 --eval accuracy")
    results = log_rows("learnt")[-1]["eval"]
    assert results["random"]["top-1"] < 30
    assert results["trained"]["top-1"] > 80


@pytest.mark.usefixtures("halves")
def test_mae_learns():
    """In 20 seconds: hidden pixels are painted better than by the mean colour."""
    run(QUICK, "--preset toy-mae --steps 400 --eval reconstruction")
    result = log_rows("learnt")[-1]["eval"]["trained"]
    assert result["hidden error x 100"] < 0.2 * result["of mean colour"]


@pytest.mark.usefixtures("halves")
def test_diffusion_learns():
    """In 20 seconds: samples have the colour of the class that was asked for."""
    run(QUICK, "--preset toy-diffusion --steps 300 --ema 0.98 --samples 96")
    file = np.load("learnt/samples.npz")
    left = file["arr_0"][:, :, :3].mean((1, 2))  # [96, 3]
    taken = np.linalg.norm(left[:, None] - HUES, axis=2).argmin(1)
    assert (taken == file["labels"]).mean() > 0.5
