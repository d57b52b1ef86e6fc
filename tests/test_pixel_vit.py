"""pixel_vit.py against the numbers of MAE, DiT and timm (tests/golden/pixel_vit) and its own promises.

What it shares with ijepa.py byte for byte is tested there; what all scripts promise, in test_runs.py.
"""

import argparse
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import run_several
from PIL import Image

import common
import pixel_vit
from pixel_vit import Config, Diffusion, World

GOLDEN = Path(__file__).parent / "golden" / "pixel_vit"
ALONE = World(0, 1, torch.device("cpu"))


def golden(name):
    return np.load(GOLDEN / f"{name}.npz", allow_pickle=False)


def tensor(array, dtype=None):
    found = torch.from_numpy(np.array(array))
    return found.to(dtype) if dtype else found


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected, torch.float64), atol=atol, rtol=rtol)


def near(actual, expected, share=1e-4):
    """Assert that two arrays differ by no more than a share of the largest value."""
    close(actual, expected, atol=share * float(np.abs(expected).max()))


def gradient_norms(model, loss, names):
    """L2 norm of the gradient of each named parameter."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[str(n)] for n in names], retain_graph=True)
    return torch.stack([g.norm() for g in gradients])


def log_rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- parity: classifier and MAE


def classifier(readout="gap", **changes):
    """The golden ViT on 6 x 6 pixels; its cls variant uses fc_norm as norm."""
    config = Config(image_size=6, width=12, depth=2, heads=3, classes=5, readout=readout, **changes)
    model = pixel_vit.build(config)[0]
    state = torch.load(GOLDEN / "vit_pixel_ckpt.pth", weights_only=True)["model"]
    if readout == "cls":
        state = {k.replace("fc_norm", "norm"): v for k, v in state.items()}
    model.load_state_dict(state)
    return model, config


@pytest.mark.parametrize("readout", ["gap", "cls"])
@pytest.mark.parametrize("recompute", [False, True])
def test_classifier(readout, recompute):
    g = golden("vit_pixel")
    model, config = classifier(readout, recompute=recompute)
    images, labels = tensor(g["imgs"]), tensor(g["labels"])
    read, tokens = model(images, features=True)
    close(read, g[f"{readout}_features"], atol=1e-5)
    if readout == "gap":
        close(tokens, g["gap_tokens_prenorm"], atol=1e-5)
    logits = model(images)
    close(logits, g[f"{readout}_logits"], atol=1e-5)
    loss = pixel_vit.classification_loss(logits, pixel_vit.smooth_targets(labels, 5, 0.0))
    close(loss, g[f"{readout}_ce"], rtol=1e-4)
    close(gradient_norms(model, loss, g["gradnorm_names"]), g[f"{readout}_gradnorm"], rtol=1e-4)


def test_pixels_in_another_order():
    """Permuted pixels change the output, positions permuted alike change it back, no positions make it invariant."""
    g = golden("vit_pixel")
    images, order = tensor(g["imgs"]), tensor(g["perm"])
    model, _ = classifier()
    model.permutation = order
    close(model(images), g["perm_logits_learned_pe"], atol=1e-5)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    close(model(images), g["perm_logits_perm_pe"], atol=1e-5)
    close(model(images), g["gap_logits"], atol=1e-5)
    with torch.no_grad():
        model.pos_embed.zero_()
    close(model(images), g["nope_logits_perm"], atol=1e-5)
    model.permutation = None
    close(model(images), g["nope_logits"], atol=1e-5)


@pytest.mark.parametrize("kind", ["patch", "pixel"])
def test_mae(kind):
    g, path = golden(f"mae_{kind}"), GOLDEN / f"mae_{kind}_ckpt.pth"
    model, config = pixel_vit.load_model(path, heads=2 if kind == "patch" else 3, decoder_heads=2)
    assert config.task == "mae" and config.patch == (2 if kind == "patch" else 1)
    model.requires_grad_(True)
    images, noise = tensor(g["imgs"]), tensor(g["noise"])
    keep, restore, mask = pixel_vit.random_masking(noise, float(g["mask_ratio"]))
    np.testing.assert_array_equal(keep, g["ids_keep"])
    np.testing.assert_array_equal(restore, g["ids_restore"])
    np.testing.assert_array_equal(mask, g["mask"])
    close(model.norm(model.run(common.old_gather_tokens(model.embed(images), keep))), g["latent"], atol=1e-5)
    everything = common.old_gather_tokens(model.embed(images), noise.argsort(1))
    close(model.norm(model.run(everything)), g["latent_mask0"], atol=1e-5)
    close(model.run(model.embed(images)), g["plain_tokens_prenorm"], atol=1e-5)
    pooled, tokens = model(images, features=True)
    close(tokens, g["plain_tokens_norm"], atol=1e-5)
    close(pooled, g["plain_tokens_norm"][:, 1:].mean(1), atol=1e-5)
    prediction, mask = model(images, noise)
    close(prediction, g["pred"], atol=1e-5)
    close(pixel_vit.patchify(images, config.patch), g["patchify"])
    close(pixel_vit.unpatchify(prediction, config.patch), g["unpatchify_of_pred"], atol=1e-5)
    for name, norm_pix in (("", False), ("_normpix", True)):
        loss = pixel_vit.mae_loss(prediction, pixel_vit.mae_target(images, config.patch, norm_pix), mask)
        close(loss, g[f"loss{name}"], rtol=1e-4)
        close(gradient_norms(model, loss, g["gradnorm_names"]), g[f"gradnorm{name}"], rtol=1e-4)


def test_masking_counts_and_frequencies():
    g = golden("misc_masking")
    for tokens, ratio, kept in g["len_keep_table"]:
        assert pixel_vit.kept_tokens(int(tokens), float(ratio)) == max(1, int(kept))
    noise = torch.rand(2000, 64, generator=torch.Generator().manual_seed(1238))
    mask = pixel_vit.random_masking(noise, 0.75)[2]
    close(1 - mask.mean(0), g["keep_fraction_per_position"], atol=1e-6)


def test_position_tables():
    g = golden("pos_embed")
    for name in (n for n in g.files if n[:4] in ("mae_", "dit_")):
        width, grid = (int(part[1:]) for part in name.split("_")[1:])
        table = pixel_vit.make_positions("sincos", 0.0, width, grid, special=int(name.startswith("mae")))
        close(table[0], g[name], atol=1e-6)
        assert not table.requires_grad
    model = pixel_vit.build(Config(image_size=6, width=8, depth=1, heads=2, classes=2))[0]
    found = pixel_vit.resize_positions({"pos_embed": tensor(g["interp_in"])}, model, "a file")
    close(found["pos_embed"], g["interp_out"], atol=1e-5)
    learned = pixel_vit.make_positions("learned", 0.02, 64, 20, special=1)
    assert learned.requires_grad and abs(learned.std().item() - 0.02) < 1e-3
    assert pixel_vit.make_positions("learned-sincos", 0.02, 64, 20, special=1).requires_grad
    assert not pixel_vit.make_positions("none", 0.02, 64, 20).any()


# ----------------------------------------------------------------------------------------------- parity: optimisation


def test_learning_rate_schedule():
    g = golden("lr_schedule")
    config = Config(lr=float(g["arg_lr"]), lr_final=float(g["arg_min_lr"]), warmup=5 / 40)
    for epoch, expected in zip(g["epoch"], g["lr"]):
        steps = 40 * 1000
        lr = pixel_vit.schedules(config, round(epoch * 1000), steps)[0]
        assert lr == pytest.approx(float(expected), rel=1e-4 if abs(epoch * 1000 % 1) > 1e-6 else 1e-9, abs=1e-12)


def test_layers_learn_at_their_own_rate():
    g = golden("layer_decay")
    config = Config(depth=int(g["depth"]), layer_decay=float(g["layer_decay"]))
    shapes = {name: p.dim() for name, p in classifier()[0].named_parameters()}
    assert set(map(str, g["names"])) == set(shapes)
    for name, layer, scale, decay in zip(g["names"], g["layer_id"], g["lr_scale"], g["weight_decay"]):
        found = pixel_vit.parameter_rule(str(name), shapes[str(name)], config)
        assert found[0] == layer and found[1] == pytest.approx(float(scale)) and found[2] == (decay > 0), name
    assert pixel_vit.parameter_rule("cls_token", 3, replace(config, task="mae"))[2], "MAE decays its tokens"


def test_average_of_weights():
    g = golden("ema")
    source, target = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
    target.weight.data = tensor(g["ema0_w"])
    ema = common.OLD_EMA(target, source)
    for i, decay in enumerate((0.9999, 0.9999, 0.9)):
        source.weight.data = tensor(g["model_w_seq"][i])
        ema.update(decay)
        close(target.weight, g[f"ema{i + 1}_w"], atol=1e-6)
        ema = common.OLD_EMA(target, source.requires_grad_(True))


def test_stochastic_depth():
    g = golden("drop_path")
    torch.manual_seed(int(g["seed"]))
    kept = torch.empty(16).bernoulli_(1 - float(g["p"]))
    close(common.old_stochastic_depth(torch.ones(16, 3, 2), float(g["p"]), kept), g["out_of_ones"], atol=1e-6)
    model = pixel_vit.build(Config(depth=12, width=8, heads=2, classes=2, drop_path=0.1))[0]
    close(torch.tensor([block.drop_path for block in model.blocks]), g["linspace_rates_depth12_rate0p1"], atol=1e-8)


def test_linear_probe():
    g = golden("linprobe")
    for decay in (0.0, 0.01):
        weights = [tensor(g["w0"])[None].clone(), tensor(g["b0"])[None].clone()]
        momenta = [torch.zeros_like(w) for w in weights]
        for step in range(3):
            rate, none = torch.tensor([0.5]), torch.zeros(1)
            gradients = [tensor(g["grad_w"][step])[None], tensor(g["grad_b"][step])[None]]
            pixel_vit.lars_step(weights[:1], gradients[:1], momenta[:1], rate, torch.tensor([decay]))
            pixel_vit.lars_step(weights[1:], gradients[1:], momenta[1:], rate, none)
            close(weights[0][0], g[f"wd{decay}_step{step}_w"], rtol=1e-5, atol=1e-7)
            close(weights[1][0], g[f"wd{decay}_step{step}_b"], rtol=1e-5, atol=1e-7)
    x, weight, bias = tensor(g["feat"]), tensor(g["head_w"]), tensor(g["head_b"])
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    close(pixel_vit.standardise(x, mean, variance) @ weight.T + bias, g["train_out"], atol=1e-5)
    close(pixel_vit.standardise(x, tensor(g["running_mean"]), tensor(g["running_var"])) @ weight.T + bias,
          g["eval_out_after_one_step"], atol=1e-5)  # fmt: skip
    close(0.1 * mean, g["running_mean"], atol=1e-6)
    close(0.9 + 0.1 * variance * 6 / 5, g["running_var"], atol=1e-6)


# ----------------------------------------------------------------------------------------------- parity: augmentation


def test_operations_of_randaugment():
    g = golden("randaugment_ops")
    image = tensor(g["img"]).permute(2, 0, 1)[None].float()
    names = [str(name) for name in g["names"]]
    assert len(names) == len(pixel_vit.OPERATIONS)
    ours = [name.replace("Increasing", "").replace("Rel", "") for name in names]
    for name, simple in zip(names, ours):
        mine = next(o for o in pixel_vit.OPERATIONS if o.replace(" ", "") == simple.lower())
        arguments = g[f"{name}/args"]
        for sign in (-1.0, 1.0):
            value = pixel_vit.operation_value(mine, torch.tensor([9.0]), torch.tensor([sign]))
            if len(arguments) and abs(float(value) - float(arguments[0])) < 1e-4:
                break
        else:
            assert not len(arguments), f"{mine} takes {arguments}, not {value}"
        found = pixel_vit.operate(mine, image.repeat(2, 1, 1, 1), value.repeat(2))
        expected = tensor(g[f"{name}/out"]).permute(2, 0, 1).float()
        worst = (found[1] - expected).abs().max().item()
        assert worst <= 1, f"{mine}: {worst}"
        assert torch.equal(found[0], found[1]) and (found == found.round()).all()


def test_crops_have_the_golden_statistics():
    """The same distribution as torchvision's, drawn for a batch at once."""
    g = golden("crops")
    sizes = torch.tensor([[50, 40]]).expand(20000, 2)
    boxes = pixel_vit.random_crops(sizes, (0.2, 1.0), torch.Generator().manual_seed(0))
    expected, spread = g["tvcrop_stat_mean_i_j_h_w"], g["tvcrop_stat_std"]
    assert (np.abs(boxes.double().mean(0).numpy() - expected) < 4 * spread / math.sqrt(3000)).all()
    assert (np.abs(boxes.double().std(0).numpy() - spread) < 0.05 * spread).all()


def test_centre_crop():
    g = golden("crops")
    for size in (16, 28, 40):
        found = pixel_vit.centre_crop(Image.fromarray(g["src"]), size).permute(1, 2, 0)
        assert (found.int() - tensor(g[f"dit_center_crop_{size}"]).int()).abs().max() <= 1


def test_mixing():
    g = golden("mixup")
    x, y = tensor(g["x"]), tensor(g["y"])
    for b in range(6):
        box = [int(v) for v in g[f"b{b}_bbox_yl_yh_xl_xh"]] if g[f"b{b}_use_cutmix"] else None
        lam = float(g[f"b{b}_lam_final"])
        close(pixel_vit.mix_images(x, x.flip(0), lam, box), g[f"b{b}_x"], atol=1e-5)
        targets = pixel_vit.smooth_targets(y, 5, 0.1)
        close(torch.lerp(targets.flip(0), targets, lam), g[f"b{b}_target"], atol=1e-5)
    logits = tensor(g["logits"])
    close(pixel_vit.classification_loss(logits, tensor(g["b0_target"])), g["soft_target_ce_b0"], rtol=1e-5)
    smoothed = pixel_vit.smooth_targets(y, 5, 0.1)
    close(pixel_vit.classification_loss(logits, smoothed), g["label_smoothing_ce_0.1"], rtol=1e-5)
    close(F.cross_entropy(logits, y, label_smoothing=0.1), g["torch_ce_label_smoothing_0.1"], rtol=1e-5)


def test_mixing_is_drawn_as_the_reference_draws():
    """Shares and moments of the draws, and for given box centres the reference's boxes and corrected lam."""
    g, random = golden("mixup"), np.random.default_rng(0)
    draws = [pixel_vit.draw_mix(random, 1000, 0.8, 1.0) for _ in range(4000)]
    lams = {kind: np.array([lam for lam, box in draws if (box is not None) == kind]) for kind in (False, True)}
    assert abs(len(lams[True]) / 4000 - float(g["stat_frac_cutmix"])) < 0.03
    mean, std = g["stat_lam_mean_std_mixup"]
    assert abs(lams[False].mean() - mean) < 0.03 and abs(lams[False].std() - std) < 0.03
    lam, box = pixel_vit.draw_mix(random, 1000, 0.0, 1.0)
    assert lam == pytest.approx(1 - (box[1] - box[0]) * (box[3] - box[2]) / 1e6)

    class Given:
        """Random numbers as recorded: the coin, lam, and the centre."""

        def __init__(self, lam, centre):
            self.lam, self.centre = lam, centre

        def beta(self, *_):
            return self.lam

        def integers(self, *_):
            return self.centre

    for b in (2, 4):
        expected, drawn = [int(v) for v in g[f"b{b}_bbox_yl_yh_xl_xh"]], float(g[f"b{b}_lam_drawn"])
        found = [pixel_vit.draw_mix(Given(drawn, (cy, cx)), 6, 0.0, 1.0) for cy in range(6) for cx in range(6)]
        matching = [lam for lam, box in found if box == expected]
        assert matching and matching[0] == pytest.approx(float(g[f"b{b}_lam_final"]))


# ---------------------------------------------------------------------------------------------------- parity: diffusion


def dit(kind, **changes):
    heads = dict(patch=2, pixel=3)[kind]
    model, config = pixel_vit.load_model(GOLDEN / f"dit_{kind}_ckpt.pt", heads=heads, **changes)
    return model, config


@pytest.mark.parametrize("kind", ["patch", "pixel"])
def test_dit(kind):
    g, name = golden("dit"), dict(patch="dit2", pixel="dit1")[kind]
    model, config = dit(kind)
    assert config.task == "diffusion" and config.classes == (5 if kind == "patch" else 7)
    assert config.image_size == (48 if kind == "patch" else 4) and config.channels == (4 if kind == "patch" else 3)
    x, t, y = (tensor(g[f"{name}_{k}"]) for k in "xty")
    close(model(x, t, y), g[f"{name}_out"], atol=1e-5)
    condition = model.t_embedder(t) + model.y_embedder(y)
    close(model.t_embedder(t), g[f"{name}_t_emb"], atol=1e-5)
    close(model.y_embedder(y), g[f"{name}_y_emb"], atol=1e-5)
    tokens = model.x_embedder(model.x_embedder.patchify(x)) + model.pos_embed
    close(tokens, g[f"{name}_tokens0"], atol=1e-5)
    close(model.blocks[0](tokens, condition), g[f"{name}_tokens1"], atol=1e-5)
    x, t, y = (tensor(g[f"{name}_cfg_{k}"])[:2] for k in "xty")
    for scale in (1.5, 4.0):
        close(pixel_vit.guided(model, x, t, y, scale, 3), g[f"{name}_cfg_out_{scale}"][:2], atol=1e-5)
    tokens = tensor(g[f"{name}_unpatchify_in"])
    close(pixel_vit.unpatchify(tokens, config.patch), g[f"{name}_unpatchify_out"])


def test_embeddings_of_time_and_label():
    g = golden("dit")
    for width in (8, 7, 256):
        found = pixel_vit.timestep_embedding(tensor(g["timestep_embedding_t"]), width)
        # t up to 1000 times a frequency whose last bit differs among machines
        close(found, g[f"timestep_embedding_{width}"], atol=1e-4)
    labels = tensor(g["label_drop_labels"])
    uniform = torch.rand(200, generator=torch.Generator().manual_seed(int(g["label_drop_seed"])))
    np.testing.assert_array_equal(pixel_vit.drop_labels(labels, uniform, 0.1, 10), g["label_drop_out"])
    forced = 1.0 - tensor(g["label_drop_forced_ids"], torch.float32)
    np.testing.assert_array_equal(pixel_vit.drop_labels(labels, forced, 0.5, 10), g["label_drop_forced_out"])
    assert (pixel_vit.drop_labels(torch.tensor([-1, 3]), torch.ones(2), 0.1, 10)).tolist() == [10, 3]


def test_an_untrained_dit_gives_zero_and_all_start_alike():
    config = Config(task="diffusion", image_size=4, width=16, depth=2, heads=2, classes=3)
    model = pixel_vit.build(config)[0]
    out = model(torch.randn(2, 3, 4, 4), torch.tensor([0, 999]), torch.tensor([0, 3]))
    assert out.shape == (2, 6, 4, 4) and not out.any()
    linear = model.blocks[0].attn.qkv.weight
    assert linear.abs().max() <= math.sqrt(6 / (16 + 48)) + 1e-6 and linear.std() > 0.9 * math.sqrt(2 / 64)


def process(spec="1000", schedule="linear"):
    return Diffusion(pixel_vit.noise_betas(schedule, 1000), pixel_vit.space_timesteps(1000, spec))


def test_diffusion_tables():
    g, linear = golden("gaussian_diffusion"), process()
    for name in (n for n in g.files if n.startswith("lin1000/")):
        close(linear.tables[name.split("/")[1]][g["t_index"]], g[name], rtol=1e-12, atol=1e-300)
    cosine = pixel_vit.noise_betas("cosine", 1000)
    close(torch.from_numpy(cosine[g["t_index"]]), g["cos1000/betas"], rtol=1e-12)
    close(torch.from_numpy(np.cumprod(1 - cosine)[g["t_index"]]), g["cos1000/alphas_cumprod"], rtol=1e-12)
    for name in (n for n in g.files if n.startswith("steps/")):
        _, timesteps, spec = name.split("/")
        assert pixel_vit.space_timesteps(int(timesteps), spec) == g[name].tolist(), name
    ten = process(str(int(g["resp"])))
    for name in (n for n in g.files if n.startswith("resp10/") and "map" not in n):
        close(ten.tables[name.split("/")[1]], g[name], rtol=1e-12)
    np.testing.assert_array_equal(ten.timestep_map, g["resp10/timestep_map"])
    betas = process("250").tables["betas"]
    close(torch.cat([betas[:5], betas[-5:]]), g["resp250/betas_first5_last5"], rtol=1e-12)
    for spec in ("ddim999", "1001", "3,999", "few"):
        with pytest.raises(SystemExit):
            pixel_vit.space_timesteps(1000, spec)


def test_denoising_step():
    g, d = golden("gaussian_diffusion"), process()
    model, _ = dit("pixel")
    x_start, noise, t, y = (tensor(g[k]) for k in ("x_start", "noise", "t", "y"))
    x = d.q_sample(x_start, t, noise)
    close(x, g["q_sample"], atol=1e-6)
    near(d.posterior_mean(x_start, x, t), g["q_posterior_mean"])
    close(d.tables["posterior_variance"][t], g["q_posterior_variance"], rtol=1e-6)
    close(d.tables["posterior_log_variance_clipped"][t], g["q_posterior_log_variance"], rtol=1e-6)
    output = model(x, t, y)
    for clip in (0, 1):
        for value, name in zip(d.denoise(output, x, t, bool(clip)), ("mean", "log_variance", "pred_xstart")):
            near(value, g[f"p_mean_variance_clip{clip}/{name}"])
    close(d.prior_bits(x_start), g["prior_bpd"], rtol=1e-4)
    found = pixel_vit.discretised_log_likelihood(x_start, 0.3 * noise, torch.tensor(-1.0))
    close(found, g["discretized_ll"], rtol=1e-4, atol=1e-5)


VARIANTS = dict(default={}, rescaled_mse=dict(diffusion_loss="rescaled_mse"), kl=dict(diffusion_loss="kl"),
                fixed_sigma=dict(learn_sigma=False), predict_xstart=dict(predict="image"), respaced={})  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusion_losses(variant):
    g, config = golden("gaussian_diffusion"), Config(**VARIANTS[variant])
    d = process("10" if variant == "respaced" else "1000")
    model, _ = dit("pixel")
    model.requires_grad_(True)
    x_start, noise, y = (tensor(g[k]) for k in ("x_start", "noise", "y"))
    k = tensor(g["resp_t" if variant == "respaced" else "t"])
    x = d.q_sample(x_start, k, noise)
    output = model(x, d.timestep_map[k], y)
    output = output[:, :3] if variant == "fixed_sigma" else output
    terms = pixel_vit.diffusion_loss(d, output, x_start, x, k, noise, config)
    expected = [n.split("/")[1] for n in g.files if n.startswith(f"loss_{variant}/") and "gradnorm" not in n]
    assert set(expected) == set(terms)
    for name in expected:
        close(terms[name], g[f"loss_{variant}/{name}"], rtol=1e-4, atol=1e-7)
    names = [n for n in g["gradnorm_names"]]
    close(gradient_norms(model, terms["loss"].mean(), names), g[f"loss_{variant}/gradnorm"], rtol=1e-4, atol=1e-9)


SAMPLERS = dict(ddpm_noclip=dict(clip_samples=False), ddpm_clip={}, ddim_eta0=dict(sampler="ddim", clip_samples=False))
SAMPLERS["ddim_eta0.5_clip"] = dict(sampler="ddim", eta=0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name):
    g, d = golden("gaussian_diffusion"), process("10")
    model, _ = dit("pixel")
    y, noise = tensor(g["sample_y"]), tensor(g["sample_step_noise"])
    config = Config(**SAMPLERS[name])
    steps = list(
        pixel_vit.sample_loop(d, lambda x, t: model(x, t, y), tensor(g["sample_zT"]), lambda i: noise[i], config)
    )
    near(steps[-1][0], g[f"sample_{name}"])
    if name == "ddpm_clip":
        for i in range(3):
            near(steps[i][0], g["traj_ddpm_clip_sample"][i])
            near(steps[i][1], g["traj_ddpm_clip_pred_xstart"][i])


def test_guided_sampler():
    g, d = golden("gaussian_diffusion"), process("10")
    model, _ = dit("pixel")
    y, noise, scale = tensor(g["sample_y"]), tensor(g["cfg_sample_step_noise"])[:, :2], float(g["cfg_sample_scale"])
    loop = pixel_vit.sample_loop(d, lambda x, t: pixel_vit.guided(model, x, t, y, scale, 3), tensor(g["sample_zT"]),
                                 lambda i: noise[i], Config())  # fmt: skip
    near(list(loop)[-1][0], g["cfg_sample_full"][:2])


def test_bits_per_dimension():
    g, d = golden("gaussian_diffusion"), process("5")
    model, _ = dit("pixel")
    y, noise = tensor(g["y"]), tensor(g["bpd5_noise"])
    found = pixel_vit.bits_per_dimension(
        d, lambda x, t: model(x, t, y), tensor(g["x_start"]), lambda i: noise[i], Config()
    )
    for name, value in found.items():
        close(value, g[f"bpd5/{name}"], rtol=1e-4)


def test_metrics_of_samples():
    g = golden("gen_metrics")
    real, fake = tensor(g["feat_real"]), tensor(g["feat_fake"])
    for name, x in (("real", real), ("fake", fake)):
        mean, covariance = pixel_vit.moments(x)
        close(mean, g[f"mu_{name}"], rtol=1e-8)
        close(covariance, g[f"sigma_{name}"], rtol=1e-8, atol=1e-12)
    distance = pixel_vit.frechet_distance(*pixel_vit.moments(real), *pixel_vit.moments(fake))
    assert distance == pytest.approx(float(g["fd"]), rel=1e-8)
    assert distance == pytest.approx(float(g["fd_scipy_sqrtm"]), rel=1e-8)
    n = int(g["singular_n"])
    few = pixel_vit.frechet_distance(*pixel_vit.moments(real[:n]), *pixel_vit.moments(fake[:n]))
    assert few == pytest.approx(float(g["fd_singular"]), rel=1e-5)
    means = tensor(g["mu_real"]), tensor(g["mu_fake"])
    diagonal = pixel_vit.frechet_distance(means[0], tensor(g["diag1"]).diag(), means[1], tensor(g["diag2"]).diag())
    assert diagonal == pytest.approx(float(g["fd_diag"]), rel=1e-8)
    probabilities = tensor(g["is_probs"])
    assert pixel_vit.inception_score(probabilities, 1)[0] == pytest.approx(float(g["inception_score_1split"]), rel=1e-8)
    assert pixel_vit.inception_score(probabilities) == pytest.approx(g["inception_score_10split_mean_std"], rel=1e-8)
    assert pixel_vit.precision_recall(real, fake) == pytest.approx(tuple(g["precision_recall_k3"]), abs=1e-8)


# --------------------------------------------------------------------------------------------------------- own promises

TINY = "--image-size 8 --width 16 --depth 2 --heads 2 --batch 16 --device cpu --no-compile --log-every 1".split()
TASKS = {
    "classify": "--randaugment 2 --mixup 0.8 --cutmix 1 --smoothing 0.1 --erase 0.5 --drop-path 0.3 --jitter 0.4",
    "mae": "--task mae --decoder-width 16 --decoder-heads 2 --decoder-depth 1",
    "diffusion": "--task diffusion --clip 1 --sampler-steps 4",
}
FOUR_STEPS = "--steps 4 --eval none --lr 1e-5 --lr-start 1e-5 --flip".split()


def main(*flags, code=None):
    """The command line in this process, on one thread, its signal handlers undone; expect to leave with `code`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if code is None:
            return pixel_vit.main(list(map(str, flags)))
        with pytest.raises(SystemExit) as stop:
            pixel_vit.main(list(map(str, flags)))
        assert stop.value.code == code
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def weights(out):
    state = torch.load(Path(out) / "last.pt", weights_only=True)
    return {**state["model"], **{f"target.{k}": v for k, v in state["target"].items()}}


def largest_difference(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[k].double() - b[k].double()).abs().max().item() for k in a)


@pytest.mark.parametrize("task", TASKS)
def test_stopped_and_resumed_is_bitwise(task, monkeypatch):
    flags = [*TINY, *TASKS[task].split(), "--steps", 6, "--eval", "none", "--sample", 5 * (task == "diffusion")]
    main(*flags, "--out", "whole")
    progress = common.OldLog.progress

    def ask_at_three(log, step, **shown):  # as a signal would, after this step has been checked
        progress(log, step, **shown)
        if step == 3 and log.start == 0:
            log.stop = signal.SIGTERM

    monkeypatch.setattr(common.OldLog, "progress", ask_at_three)
    main(*flags, "--out", "parts", code=0)
    assert torch.load("parts/last.pt", weights_only=True)["step"] == 4
    main(*flags, "--out", "parts", "--resume")
    assert largest_difference("whole", "parts") == 0
    assert [row["loss"] for row in log_rows("whole") if "loss" in row] == [
        row["loss"] for row in log_rows("parts") if "loss" in row
    ]
    if task == "diffusion":
        one, two = (np.load(f"{out}/samples.npz") for out in ("whole", "parts"))
        np.testing.assert_array_equal(one["arr_0"], two["arr_0"])
        assert one["arr_0"].shape == (5, 8, 8, 3) and one["labels"].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Runs of every task on two ranks, plain and sharded, made by one pair of processes."""
    folder, lines = tmp_path_factory.mktemp("ranks"), []
    for task, flags in TASKS.items():
        line = ["pixel_vit", *TINY, *flags.split(), *FOUR_STEPS, "--out"]
        lines += [[*line, folder / task / "shard", "--shard"]]
        lines += [[*line, folder / task / "two", "--sample", 5 * (task == "diffusion"), "--sample-batch", 3]]
    run_several(*lines, ranks=2)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_are_one_process(task, on_two_ranks):
    flags = [*TINY, *TASKS[task].split(), *FOUR_STEPS]
    main(*flags, "--out", "one", "--sample", 5 * (task == "diffusion"))
    main(*flags, "--out", "parts", "--accumulate", 4, "--recompute")
    for other in (on_two_ranks / task / "two", on_two_ranks / task / "shard", "parts"):
        assert largest_difference("one", other) < 1e-5
        for a, b in zip(log_rows("one"), log_rows(other), strict=False):
            if "loss" in a:
                assert b["loss"] == pytest.approx(a["loss"], rel=5e-5)
                assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=5e-5)
    if task == "diffusion":
        one, two = (np.load(Path(out) / "samples.npz")["arr_0"] for out in ("one", on_two_ranks / task / "two"))
        assert np.abs(one.astype(int) - two).max() <= 1


def test_a_sample_does_not_depend_on_its_batch():
    config = Config(task="diffusion", image_size=4, width=16, depth=2, heads=2, classes=3, sampler_steps="5")
    model = pixel_vit.build(config)[0].eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    together, labels = pixel_vit.sample_images(model, config, 60, 70, "cpu")
    assert labels.tolist() == [i % 3 for i in range(60, 70)] and together.shape == (10, 3, 4, 4)
    alone = torch.cat([pixel_vit.sample_images(model, config, i, i + 1, "cpu")[0] for i in range(60, 70)])
    assert (together.int() - alone.int()).abs().max() <= 1
    shared = pixel_vit.sample_share(model, replace(config, sample_batch=7), 70, ALONE)[0]
    assert (shared[60:].int() - together.int()).abs().max() <= 1
    other = pixel_vit.sample_images(model, replace(config, seed=1), 60, 70, "cpu")[0]
    assert (other.int() - together.int()).abs().float().mean() > 5
    only = pixel_vit.sample_images(model, replace(config, sample_class=2), 60, 70, "cpu")[1]
    assert only.tolist() == [2] * 10


def test_guidance_uses_the_label_that_is_none():
    model, _ = dit("pixel")
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([5, 500]), torch.tensor([1, 2])
    plain, null = model(x, t, y), model(x, t, torch.tensor([7, 7]))
    found = pixel_vit.guided(model, x, t, y, 3.0)
    torch.testing.assert_close(found[:, :3], null[:, :3] + 3 * (plain - null)[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 3:], plain[:, 3:], atol=1e-5, rtol=1e-5)
    assert torch.equal(pixel_vit.guided(model, x, t, y, 1), plain)


def test_augmentation_follows_the_draws():
    images = torch.randint(0, 256, (400, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    config = Config(batch=400, randaugment=2)
    draws = pixel_vit.draw_augmentation(400, config, common.old_generator(0))
    applied = draws["operation"] >= 0
    assert abs(applied.double().mean() - 0.5) < 0.06 and draws["level"].mean().item() == pytest.approx(9, abs=0.1)
    assert set(draws["operation"].flatten().tolist()) == set(range(-1, 15))
    changed = pixel_vit.augment(images, draws)
    assert ((changed >= 0) & (changed <= 255)).all()
    assert torch.equal(changed[~applied.any(1)], images[~applied.any(1)])
    part = {k: v[100:200] for k, v in draws.items()}
    assert torch.equal(pixel_vit.augment(images[100:200], part), changed[100:200]), "a sample is augmented by itself"
    boxes = pixel_vit.draw_erasing(4000, 32, 0.25, common.old_generator(0))
    share = (boxes[:, 2] * boxes[:, 3]).double() / 32**2
    assert abs((share > 0).double().mean() - 0.25) < 0.03 and 0.015 < share[share > 0].min() and share.max() < 0.36
    assert ((boxes[:, :2] >= 0) & (boxes[:, :2] + boxes[:, 2:] <= 32)).all()
    erased = pixel_vit.erase(torch.zeros(4000, 3, 32, 32), boxes, torch.ones(4000, 3, 32, 32))
    torch.testing.assert_close(erased.mean((1, 2, 3)).double(), share)
    targets = torch.eye(4)
    assert torch.equal(pixel_vit.neighbours(targets), targets[[1, 0, 3, 2]])


def test_pixels_trade_places():
    for pairs, distance in ((0, 0), (5, 0), (72, 0), (20, 2)):
        order = pixel_vit.pixel_permutation(12, pairs, distance, seed=1)
        assert sorted(order.tolist()) == list(range(144))
        assert torch.equal(order[order], torch.arange(144)), "each pixel moves once at most"
        moved = (order != torch.arange(144)).nonzero()[:, 0]
        assert len(moved) == 2 * pairs
        if distance:
            apart = (moved // 12 - order[moved] // 12).abs() + (moved % 12 - order[moved] % 12).abs()
            assert apart.max() <= distance
    assert not torch.equal(pixel_vit.pixel_permutation(12, 5, 0, 1), pixel_vit.pixel_permutation(12, 5, 0, 2))
    main(*TINY, "--steps", 1, "--permute", 9, "--out", "permuted", "--eval", "none")
    model, config = pixel_vit.load_model("permuted/last.pt")
    assert config.permute == 9 and torch.equal(model.permutation, pixel_vit.pixel_permutation(8, 9, 0, 0))


def test_work_and_size_are_those_of_the_paper():
    """Parameters and multiply-adds of the specification's tables."""
    tiny = Config(image_size=32, classes=100, **pixel_vit.TINY)
    assert sum(p.numel() for p in pixel_vit.build(tiny)[0].parameters()) / 1e6 == pytest.approx(5.56, abs=0.01)
    assert pixel_vit.forward_work(tiny) / 1e9 == pytest.approx(10.3, rel=0.02)
    small = Config(image_size=32, patch=2, **pixel_vit.SMALL)
    assert pixel_vit.forward_work(small) / 1e9 == pytest.approx(6, rel=0.03)
    large = Config(task="diffusion", image_size=256, downsample=8, channels=4, **pixel_vit.LARGE)
    assert pixel_vit.forward_work(large) / 1e9 == pytest.approx(360, rel=0.02)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_mae_becomes_a_classifier(capsys):
    """Pretrain, then tune: the trunk is the MAE's, the head starts at nearly nothing, positions follow the size."""
    main(*TINY, *TASKS["mae"].split(), "--steps", 1, "--eval", "none", "--out", "mae")
    flags = "--task classify --init mae/last.pt --steps 1 --eval accuracy --no-baselines --lr 0 --lr-final 0".split()
    main(*TINY, *flags, "--out", "tuned")
    before, after = weights("mae"), weights("tuned")
    for name in ("pos_embed", "blocks.1.mlp.fc1.weight", "cls_token"):
        assert torch.equal(before[f"target.{name}"], after[name])
    assert after["head.weight"].abs().max() < 1e-4 and after["head.weight"].any() and "norm.weight" not in after
    assert {"top1", "top5"} == log_rows("tuned")[-1]["eval"]["trained"].keys()
    main(*TINY[2:], *flags, "--image-size", 12, "--out", "larger")
    assert "interpolated from 8x8 to 12x12" in capsys.readouterr().out
    assert weights("larger")["pos_embed"].shape == (1, 145, 16)


def test_official_checkpoints_with_arguments_and_other_heads(tmp_path):
    """MAE's files of pretraining (encoder only) and training (with a Namespace), DiT's with `ema` and `module.`."""
    state = torch.load(GOLDEN / "mae_pixel_ckpt.pth", weights_only=True)["model"]
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, "encoder.pth")
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, "training.pth")
    images = tensor(golden("mae_pixel")["imgs"])
    for path in ("encoder.pth", "training.pth"):
        model, _ = pixel_vit.load_model(path, heads=3)
        close(model(images, features=True)[1], golden("mae_pixel")["plain_tokens_norm"], atol=1e-5)
    model, config = pixel_vit.load_model("encoder.pth", heads=3, task="classify", classes=5)
    close(model.run(model.embed(images)), golden("mae_pixel")["plain_tokens_prenorm"], atol=1e-5)
    weights = torch.load(GOLDEN / "dit_pixel_ckpt.pt", weights_only=True)
    torch.save(
        {"ema": {f"module.{k}": v for k, v in weights.items()}, "opt": {}, "args": argparse.Namespace()}, "dit.pt"
    )
    model, _ = pixel_vit.load_model("dit.pt", heads=3)
    g = golden("dit")
    close(model(*(tensor(g[f"dit1_{k}"]) for k in "xty")), g["dit1_out"], atol=1e-5)
    main("--init", "dit.pt", "--heads", 3, "--sample", 3, "--sampler-steps", 3, "--device", "cpu", "--out", "sampled")
    assert np.load("sampled/samples.npz")["arr_0"].shape == (3, 4, 4, 3)
    main("--init", "encoder.pth", "--heads", 3, "--eval", "features,knn", "--no-baselines", "--tokens",
         "--device", "cpu", "--eval-limit", 300, "--out", "features")  # fmt: skip
    found = np.load("features/features.npz")
    assert found["features"].shape == (2000, 12) and found["tokens"].shape == (2000, 37, 12)
    with pytest.raises(SystemExit):
        pixel_vit.load_model("encoder.pth")  # 12 channels: how many heads?


class Codec(torch.nn.Module):
    """A stand-in for a frozen autoencoder: 2 x 2 averages and a fourth channel."""

    @torch.jit.export
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(images, 2)
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)

    @torch.jit.export
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


class Judge(torch.nn.Module):
    """A stand-in for a feature network: channel means, and scores of three classes."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = images.float().mean((2, 3))
        return means, means / 10


def test_diffusion_in_latents_judged_by_a_file(capsys):
    torch.jit.script(Codec()).save("codec.ts")
    torch.jit.script(Judge()).save("judge.ts")
    flags = "--task diffusion --codec codec.ts --channels 4 --downsample 2 --no-clip-samples --sampler-steps 3".split()
    main(*TINY, *flags, "--steps", 2, "--out", "latent", "--features", "judge.ts", "--generate", 12)
    results = log_rows("latent")[-1]["eval"]
    assert {"real", "samples", "guided", "untrained"} == results.keys()
    for result in results.values():
        assert {"frechet", "inception, own", "precision", "recall"} <= result.keys()
        assert "of the asked class" not in result, "three classes are not the ten that were asked for"
    saved = np.load("latent/statistics.npz")
    assert saved["mu"].shape == (3,) and saved["sigma"].shape == (3, 3) and saved["count"] == 12
    assert weights("latent")["x_embedder.proj.weight"].shape == (16, 4, 1, 1)
    for wrong, words in (
        (["--channels", 3], "--channels"),
        (["--codec", ""], "--codec"),
        (["--codec", "x"], "TorchScript"),
    ):
        capsys.readouterr()
        main(*TINY, *flags, *wrong, "--steps", 1, "--out", "wrong", "--resume", code=2)
        assert words in capsys.readouterr().err


def test_sweep_prints_a_table_and_goes_on_where_it_stopped(capsys):
    flags = [*TINY, "--steps", 2, "--sweep", "patch", "--sweep-values", 2, 1, "--sweep-seeds", 2, "--out", "sweep"]
    main(*flags)
    printed = capsys.readouterr().out
    assert "patch 2" in printed and "patch 1" in printed and "tokens" in printed
    (row,) = [row["sweep"] for row in log_rows("sweep") if "sweep" in row]
    assert [r["tokens"] for r in row] == [16, 64] and all(len(r["top1"]) == 2 for r in row)
    assert row[1]["multiply_adds"] > 3 * row[0]["multiply_adds"]
    assert Image.open("sweep/picture.png").size == (560, 360)
    main(*flags, "--resume")
    assert "step 1/2" not in capsys.readouterr().out, "finished runs are not trained again"
    assert [row["sweep"] for row in log_rows("sweep") if "sweep" in row][-1] == row
    for sweep, values in (("input", [1, 2]), ("permute", [0, 8])):
        variants = pixel_vit.sweep_variants(Config(image_size=8, sweep=sweep, sweep_values=tuple(values)))
        assert (
            len(variants) == 2
            and variants[1][1] == dict(input=dict(patch=2, image_size=16), permute=dict(permute=8))[sweep]
        )


def test_classifier_needs_labels_and_diffusion_does_not(tmp_path, capsys):
    for i in range(16):
        (tmp_path / "flat").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (12, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i}.png")
    flags = [*TINY, "--data", tmp_path / "flat", "--patch", 1, "--steps", 2, "--workers", 0]
    main(*flags, "--eval", "none", code=2)
    assert "train/CLASS" in capsys.readouterr().err
    for cache in (0, 2):
        more = ["--task", "diffusion", "--eval", "none", "--sampler-steps", 2, "--cache", cache]
        main(*flags, *more, "--out", f"d{cache}")
        assert weights(f"d{cache}")["y_embedder.embedding_table.weight"].shape == (1, 16)


# ------------------------------------------------------------------------------------------------------------- learning

LEARN = "--image-size 8 --device cpu --no-compile --log-every 50".split()


def test_toy_samples_are_judged_by_a_classifier_that_is_trained_for_it(monkeypatch):
    monkeypatch.setitem(pixel_vit.PRESETS, "toy", pixel_vit.PRESETS["toy"] | dict(width=16, depth=1, batch=4))
    flags = [
        *TINY,
        *TASKS["diffusion"].split(),
        "--steps",
        1,
        "--eval",
        "generate",
        "--generate",
        40,
        "--out",
        "judged",
    ]
    main(*flags)
    results = log_rows("judged")[-1]["eval"]
    assert results.keys() == {"real", "samples", "guided", "untrained"}
    assert all(math.isfinite(column["frechet"]) for column in results.values())
    assert results["real"]["frechet"] < results["samples"]["frechet"]
    assert results["real"]["of the asked class"] > 15, "the judge did not learn"


def test_classifier_learns():
    """In half a minute, at 8 x 8 pixels: far above chance (10 %) and above a random network of the same shape."""
    main(*LEARN, "--steps", 300, "--eval", "accuracy", "--out", "learnt")
    results = log_rows("learnt")[-1]["eval"]
    assert results["trained"]["top1"] > 50 and results["random"]["top1"] < 25


def test_mae_learns():
    """In half a minute: hidden pixels are painted better than by copying the nearest visible one or the mean."""
    flags = ["--task", "mae", "--steps", 300, "--eval", "reconstruction", "--no-baselines"]
    main(*LEARN, *flags, "--out", "learnt")
    result = log_rows("learnt")[-1]["eval"]["trained"]
    assert result["hidden error"] < 0.8 * result["hidden error, nearest"]
    assert result["hidden error"] < 0.8 * result["hidden error, mean colour"]


def test_diffusion_learns():
    """In half a minute: samples are nearer to images than those of an untrained network, by means of 2 x 2 pixels."""
    main(*LEARN, "--task", "diffusion", "--steps", 250, "--eval", "none", "--sampler-steps", 10, "--out", "learnt")
    model, config = pixel_vit.load_model("learnt/last.pt", sampler_steps="10", guidance=1.0)
    real = pixel_vit.toy_shapes("val", 8)[0][:300]

    def coarse(images):
        return pixel_vit.moments(F.avg_pool2d(images.float() / 255, 2).flatten(1))

    distances = []
    for network in (model, pixel_vit.build(config)[0]):
        samples = pixel_vit.sample_share(network.eval(), config, 100, ALONE)[0]
        distances.append(pixel_vit.frechet_distance(*coarse(samples), *coarse(real)))
    assert distances[0] < distances[1] / 3, distances
