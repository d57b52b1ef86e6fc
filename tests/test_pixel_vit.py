"""pixel_vit.py against the numbers of MAE, DiT and timm (tests/golden/pixel_vit), and its promises.

What all scripts promise is in test_runs.py, where this one runs as a masked autoencoder.
"""

import argparse
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import log_rows, run_several
from PIL import Image

import common
import pixel_vit
from pixel_vit import Config, Diffusion

GOLDEN = Path(__file__).parent / "golden" / "pixel_vit"
HUB = Path(__file__).parent / "golden" / "hub" / "mae"
ALONE = common.World()


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
    """Return the norm of the gradient of each named parameter."""
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[str(n)] for n in names], retain_graph=True)
    return torch.stack([g.norm() for g in gradients])


# ------------------------------------------------------------------ parity: classifier and MAE


def classifier(readout="gap", **changes):
    """Return the golden ViT on 6 x 6 pixels; its cls variant uses fc_norm as norm."""
    shape = {"image_size": 6, "width": 12, "depth": 2, "heads": 3, "classes": 5}
    model = pixel_vit.build(Config(readout=readout, **shape, **changes))[0]
    state = torch.load(GOLDEN / "vit_pixel_ckpt.pth", weights_only=True)["model"]
    if readout == "cls":
        state = {k.replace("fc_norm", "norm"): v for k, v in state.items()}
    model.load_state_dict(state)
    return model


def before_norm(model, images):
    """Return the tokens that enter the final norm."""
    norm, model.norm = model.norm, torch.nn.Identity()
    tokens, model.norm = model.tokens(images), norm
    return tokens


@pytest.mark.parametrize("readout", ["gap", "cls"])
def test_classifier(readout):
    g = golden("vit_pixel")
    model = classifier(readout)
    images = tensor(g["imgs"])
    close(model.pooled(images), g[f"{readout}_features"], atol=1e-5)
    close(before_norm(model, images), g["gap_tokens_prenorm"], atol=1e-5)
    close(model.logits(images), g[f"{readout}_logits"], atol=1e-5)
    scales = torch.ones(2, 2, len(images), 1, 1)
    loss = model(images, tensor(g["labels"]), torch.ones(1, 1), scales)
    close(loss, g[f"{readout}_ce"], rtol=1e-4)
    norms = gradient_norms(model, loss, g["gradnorm_names"])
    close(norms, g[f"{readout}_gradnorm"], rtol=1e-4)


def test_pixels_in_another_order():
    """Permuted pixels change the output, positions permuted alike change it back."""
    g = golden("vit_pixel")
    images, order = tensor(g["imgs"]), tensor(g["perm"])
    model = classifier()
    model.permutation = order
    close(model.logits(images), g["perm_logits_learned_pe"], atol=1e-5)
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:][:, order]
    close(model.logits(images), g["perm_logits_perm_pe"], atol=1e-5)
    close(model.logits(images), g["gap_logits"], atol=1e-5)
    with torch.no_grad():
        model.pos_embed.zero_()
    close(model.logits(images), g["nope_logits_perm"], atol=1e-5)
    model.permutation = None
    close(model.logits(images), g["nope_logits"], atol=1e-5)


@pytest.mark.parametrize("kind", ["patch", "pixel"])
def test_mae(kind):
    g = golden(f"mae_{kind}")
    heads = 2 if kind == "patch" else 3
    path = GOLDEN / f"mae_{kind}_ckpt.pth"
    model, config = pixel_vit.load_model(path, heads=heads, decoder_heads=2)
    assert config.task == "mae" and config.patch == (2 if kind == "patch" else 1)
    model.requires_grad_(True)
    images, noise = tensor(g["imgs"]), tensor(g["noise"])
    keep, restore, mask = pixel_vit.random_masking(noise, float(g["mask_ratio"]))
    np.testing.assert_array_equal(keep, g["ids_keep"])
    np.testing.assert_array_equal(restore, g["ids_restore"])
    np.testing.assert_array_equal(mask, g["mask"])
    close(model.tokens(images, keep), g["latent"], atol=1e-5)
    close(model.tokens(images, noise.argsort(1)), g["latent_mask0"], atol=1e-5)
    close(before_norm(model, images), g["plain_tokens_prenorm"], atol=1e-5)
    close(model.tokens(images), g["plain_tokens_norm"], atol=1e-5)
    close(model.pooled(images), g["plain_tokens_norm"][:, 1:].mean(1), atol=1e-5)
    model.readout = "cls"
    close(model.pooled(images), g["plain_tokens_norm"][:, 0], atol=1e-5)
    prediction, mask = model.paint(images, noise)
    close(prediction, g["pred"], atol=1e-5)
    close(pixel_vit.patchify(images, config.patch), g["patchify"])
    close(pixel_vit.unpatchify(prediction, config.patch), g["unpatchify_of_pred"], atol=1e-5)
    for name, norm_pix in (("", False), ("_normpix", True)):
        model.norm_pix = norm_pix
        loss = model(images, noise)
        close(loss, g[f"loss{name}"], rtol=1e-4)
        norms = gradient_norms(model, loss, g["gradnorm_names"])
        close(norms, g[f"gradnorm{name}"], rtol=1e-4)


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
        special = int(name.startswith("mae"))
        config = Config(positions="sincos", image_size=grid)
        table = pixel_vit.make_positions(config, width, special)
        close(table[0], g[name], atol=1e-6)
        assert not table.requires_grad
    close(common.interpolate_positions(tensor(g["interp_in"]), (6, 6)), g["interp_out"], atol=1e-5)
    learned = pixel_vit.make_positions(Config(positions="learned", image_size=20), 64, special=1)
    assert learned.requires_grad and abs(learned.std().item() - 0.02) < 1e-3
    assert not pixel_vit.make_positions(Config(positions="none"), 64).any()


# --------------------------------------------------------------------------- parity: optimisation


def test_learning_rate_schedule():
    g = golden("lr_schedule")
    lr, least = float(g["arg_lr"]), float(g["arg_min_lr"])
    config = Config(lr=lr, lr_floor=least / lr, warmup=5 / 40)
    for epoch, expected in zip(g["epoch"], g["lr"], strict=True):
        lr = pixel_vit.learning_rate(config, round(epoch * 1000), 40 * 1000)
        tolerance = 1e-4 if abs(epoch * 1000 % 1) > 1e-6 else 1e-9
        assert lr == pytest.approx(float(expected), rel=tolerance, abs=1e-12)
    constant = replace(config, lr_floor=1.0, warmup=0.1)
    assert pixel_vit.learning_rate(constant, 50, 1000) == pytest.approx(constant.lr / 2)
    assert pixel_vit.learning_rate(constant, 900, 1000) == constant.lr


def test_layers_learn_at_their_own_rate():
    g = golden("layer_decay")
    depth, decay = int(g["depth"]), float(g["layer_decay"])
    shapes = {name: p.dim() for name, p in classifier().named_parameters()}
    assert set(map(str, g["names"])) == set(shapes)
    undecayed = pixel_vit.Classifier.undecayed
    columns = [g[key] for key in ("names", "layer_id", "lr_scale", "weight_decay")]
    for name, layer, scale, decayed in zip(*columns, strict=True):
        rule = pixel_vit.parameter_rule(str(name), shapes[str(name)], depth, decay, undecayed)
        assert rule == (pytest.approx(float(scale)), decayed > 0), name
        assert rule[0] == pytest.approx(decay ** (depth + 1 - layer)), name
    assert pixel_vit.parameter_rule("cls_token", 3, 2, 1.0)[1], "MAE decays its tokens"


def test_average_of_weights():
    g = golden("ema")
    source, target = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(3, 2, bias=False)
    target.weight.data = tensor(g["ema0_w"])
    ema = common.EMA(target, source)
    for i, momentum in enumerate((0.9999, 0.9999, 0.9)):
        source.weight.data.copy_(tensor(g["model_w_seq"][i]))
        ema.update(momentum, torch.ones(()))
        close(target.weight, g[f"ema{i + 1}_w"], atol=1e-6)


def test_stochastic_depth(monkeypatch):
    g = golden("drop_path")
    torch.manual_seed(int(g["seed"]))
    kept = torch.empty(16).bernoulli_(1 - float(g["p"]))
    pixels = torch.zeros(16, 3, 1, 1, dtype=torch.uint8)
    config = Config(image_size=1, depth=2, width=8, heads=2, classes=2, drop_path=float(g["p"]))
    with monkeypatch.context() as patch:  # the last block's rate is p
        patch.setattr(torch, "rand", lambda *shape, **_: kept.view(16, 1, 1).expand(shape))
        scales = pixel_vit.Classifier.draw(config, pixels, None, 0)[3]
    close(scales[1, 0] * torch.ones(16, 3, 2), g["out_of_ones"], atol=1e-6)
    config = replace(config, depth=12, drop_path=0.1)
    scales = pixel_vit.Classifier.draw(config, pixels.repeat(200, 1, 1, 1), None, 0)[3]
    assert scales.shape == (12, 2, 3200, 1, 1)
    rates = g["linspace_rates_depth12_rate0p1"]
    close(scales.amax((1, 2, 3, 4)), 1 / (1 - rates), atol=1e-6)
    close((scales == 0).float().mean((1, 2, 3, 4)), rates, atol=0.015)
    block = pixel_vit.build(config)[0].blocks[-1]
    x, scales = torch.randn(3, 5, 8), torch.tensor([[0.0, 1 / 0.9, 1.0], [0.0, 0.0, 1.0]])
    out = block(x, scales[..., None, None])
    assert torch.equal(out[0], x[0]), "both branches left out"
    branch = block.attn(block.norm1(x)) / 0.9
    torch.testing.assert_close(out[1], (x + branch)[1])
    assert torch.equal(out[2], block(x)[2])


def test_linear_probe():
    g = golden("linprobe")
    for decay in (0.0, 0.01):
        weight, bias = (torch.nn.Parameter(tensor(g[name]).clone()) for name in ("w0", "b0"))
        groups = [{"params": [weight], "weight_decay": decay}]
        groups += [{"params": [bias], "weight_decay": 0.0}]
        optimizer = pixel_vit.LARS([{**group, "lr": 0.5} for group in groups], momentum=0.9)
        for step in range(3):
            weight.grad, bias.grad = tensor(g["grad_w"][step]), tensor(g["grad_b"][step])
            optimizer.step()
            close(weight, g[f"wd{decay}_step{step}_w"], rtol=1e-5, atol=1e-7)
            close(bias, g[f"wd{decay}_step{step}_b"], rtol=1e-5, atol=1e-7)
    x, weight, bias = tensor(g["feat"]), tensor(g["head_w"]), tensor(g["head_b"])
    head = pixel_vit.probe_head(x.shape[1], len(bias))
    head[1].weight.data, head[1].bias.data = weight, bias
    close(head(x), g["train_out"], atol=1e-5)
    close(head[0].running_mean, g["running_mean"], atol=1e-6)
    close(head[0].running_var, g["running_var"], atol=1e-6)
    close(head.eval()(x), g["eval_out_after_one_step"], atol=1e-5)


# --------------------------------------------------------------------------- parity: augmentation


def test_operations_of_randaugment():
    """At level 9, with either sign, as timm calls PIL: the same pixels."""
    g = golden("randaugment_ops")
    image = Image.fromarray(g["img"])
    names = [str(name) for name in g["names"]]
    assert len(names) == len(pixel_vit.OPERATIONS)
    for name in names:
        ours = name.replace("Increasing", "").replace("Rel", "").lower()
        outputs = [np.asarray(pixel_vit.OPERATIONS[ours](image, m)) for m in (-0.9, 0.9)]
        worst = [np.abs(output.astype(int) - g[f"{name}/out"]).max() for output in outputs]
        assert min(worst) == 0, name
        for m in (-1.0, 0.0, 1.0):
            assert pixel_vit.OPERATIONS[ours](image, m).size == image.size


def test_centre_crop():
    g = golden("crops")
    for size in (16, 28, 40):
        found = np.asarray(pixel_vit.centre_crop(Image.fromarray(g["src"]), size)).astype(int)
        assert np.abs(found - g[f"dit_center_crop_{size}"]).max() <= 1


def test_random_crops_are_the_references():
    g = golden("crops")
    random = torch.Generator().manual_seed(1314)
    boxes = [common.random_crop(50, 40, (0.2, 1.0), random) for _ in range(12)]
    np.testing.assert_array_equal(boxes, g["tvcrop_i_j_h_w"])


def test_mixing():
    g = golden("mixup")
    x, y = tensor(g["x"]), tensor(g["y"])
    one_hot = F.one_hot(y, 5).float()
    smoothed = 0.9 * one_hot + 0.1 / 5
    for b in range(6):
        share = torch.full((6, 6), float(g[f"b{b}_lam_final"]))
        if g[f"b{b}_use_cutmix"]:
            top, bottom, left, right = (int(v) for v in g[f"b{b}_bbox_yl_yh_xl_xh"])
            share = torch.ones(6, 6)
            share[top:bottom, left:right] = 0
        images, targets = pixel_vit.mix(x, smoothed, share)
        close(images, g[f"b{b}_x"], atol=1e-5)
        close(targets, g[f"b{b}_target"], atol=1e-5)
    # the loss smooths targets after they are mixed, which is the same
    model = classifier(smoothing=0.1)
    logits = tensor(g["logits"])
    model.logits = lambda images, scales: logits
    loss = model(x, y, torch.tensor(float(g["b0_lam_final"])), None)
    close(loss, g["soft_target_ce_b0"], rtol=1e-5)
    loss = model(x, y, torch.ones(1, 1), None)
    close(loss, g["label_smoothing_ce_0.1"], rtol=1e-5)
    close(loss, g["torch_ce_label_smoothing_0.1"], rtol=1e-5)


class Given:
    """Random numbers as recorded: own share, and the centre of the box."""

    def __init__(self, own, centre):
        self.own, self.centre = own, np.array(centre)

    def beta(self, *_):
        return self.own

    def integers(self, *_):
        return self.centre


def test_mixing_is_drawn_as_the_reference_draws():
    """Shares and moments of the draws, and for given box centres the reference's boxes."""
    g, random = golden("mixup"), np.random.default_rng(0)
    draws = [pixel_vit.draw_mix(random, 100, 0.8, 1.0) for _ in range(4000)]
    mixup = np.array([share[0, 0] for share in draws if share.min() > 0 and share.min() < 1])
    boxes = sum(share.min() != share.max() or share.min() == 1 for share in draws) / 4000
    assert abs(boxes - float(g["stat_frac_cutmix"])) < 0.03
    mean, std = g["stat_lam_mean_std_mixup"]
    assert abs(mixup.mean() - mean) < 0.03 and abs(mixup.std() - std) < 0.03
    for b in (2, 4):
        top, bottom, left, right = (int(v) for v in g[f"b{b}_bbox_yl_yh_xl_xh"])
        expected = torch.ones(6, 6)
        expected[top:bottom, left:right] = 0
        drawn = float(g[f"b{b}_lam_drawn"])
        places = [(y, x) for y in range(6) for x in range(6)]
        found = [pixel_vit.draw_mix(Given(drawn, place), 6, 0.0, 1.0) for place in places]
        matching = [share for share in found if torch.equal(share, expected)]
        assert matching
        assert matching[0].mean().item() == pytest.approx(float(g[f"b{b}_lam_final"]))


# ------------------------------------------------------------------------------ parity: diffusion


def dit(kind):
    heads = {"patch": 2, "pixel": 3}[kind]
    model, config = pixel_vit.load_model(GOLDEN / f"dit_{kind}_ckpt.pt", heads=heads)
    return model, config


@pytest.mark.parametrize("kind", ["patch", "pixel"])
def test_dit(kind):
    g, name = golden("dit"), {"patch": "dit2", "pixel": "dit1"}[kind]
    model, config = dit(kind)
    assert config.task == "diffusion" and config.classes == (5 if kind == "patch" else 7)
    assert config.image_size == (48 if kind == "patch" else 4)
    assert config.channels == (4 if kind == "patch" else 3)
    x, t, y = (tensor(g[f"{name}_{k}"]) for k in "xty")
    close(torch.cat(model.predict(x, t, y), 1), g[f"{name}_out"], atol=1e-5)
    time = model.t_embedder["mlp"](pixel_vit.timestep_embedding(t, 256))
    label = model.y_embedder["embedding_table"](y)
    close(time, g[f"{name}_t_emb"], atol=1e-5)
    close(label, g[f"{name}_y_emb"], atol=1e-5)
    tokens = model.x_embedder(common.patchify(x, config.patch)) + model.pos_embed
    close(tokens, g[f"{name}_tokens0"], atol=1e-5)
    close(model.blocks[0](tokens, time + label), g[f"{name}_tokens1"], atol=1e-5)
    x, t, y = (tensor(g[f"{name}_cfg_{k}"])[:2] for k in "xty")
    for scale in (1.5, 4.0):
        found = torch.cat(pixel_vit.guided(model, x, t, y, scale), 1)
        close(found, g[f"{name}_cfg_out_{scale}"][:2], atol=1e-5)
    for found, plain in zip(
        pixel_vit.guided(model, x, t, y, 1), model.predict(x, t, y), strict=True
    ):
        assert torch.equal(found, plain)
    tokens = tensor(g[f"{name}_unpatchify_in"])
    close(pixel_vit.unpatchify(tokens, config.patch), g[f"{name}_unpatchify_out"])


def test_embeddings_of_time_and_label():
    g = golden("dit")
    for width in (8, 7, 256):
        found = pixel_vit.timestep_embedding(tensor(g["timestep_embedding_t"]), width)
        # t up to 1000 times a frequency whose last bit differs among machines
        close(found, g[f"timestep_embedding_{width}"], atol=1e-4)
    labels = tensor(g["label_drop_labels"])
    random = torch.Generator().manual_seed(int(g["label_drop_seed"]))
    found = pixel_vit.drop_labels(labels, torch.rand(200, generator=random), 0.1, 10)
    np.testing.assert_array_equal(found, g["label_drop_out"])
    forced = 1.0 - tensor(g["label_drop_forced_ids"], torch.float32)
    found = pixel_vit.drop_labels(labels, forced, 0.5, 10)
    np.testing.assert_array_equal(found, g["label_drop_forced_out"])
    unknown = pixel_vit.drop_labels(torch.tensor([-1, 3]), torch.ones(2), 0.1, 10)
    assert unknown.tolist() == [10, 3]


def test_an_untrained_dit_gives_zero():
    shape = {"image_size": 4, "width": 16, "depth": 2, "heads": 2, "classes": 3}
    model = pixel_vit.build(Config(task="diffusion", **shape))[0]
    for out in model.predict(torch.randn(2, 3, 4, 4), torch.tensor([0, 999]), torch.tensor([0, 3])):
        assert out.shape == (2, 3, 4, 4) and not out.any()
    weight = model.blocks[0].attn.qkv.weight
    assert weight.abs().max() <= math.sqrt(6 / 64) + 1e-6
    assert weight.std() > 0.9 * math.sqrt(2 / 64)


def test_diffusion_tables():
    g, index = golden("gaussian_diffusion"), golden("gaussian_diffusion")["t_index"]
    betas = pixel_vit.noise_betas("linear")
    linear = pixel_vit.diffusion_tables(betas, pixel_vit.space_timesteps(1000))
    # what the code computes from two tables where it needs them
    signal, noise = (linear[f"sqrt_{name}alphas_cumprod"] for name in ("", "one_minus_"))
    linear["sqrt_recip_alphas_cumprod"] = 1 / signal
    linear["sqrt_recipm1_alphas_cumprod"] = noise / signal
    dropped = {"alphas_cumprod_prev", "posterior_variance"}
    for name in (n for n in g.files if n.startswith("lin1000/")):
        if name.split("/")[1] not in dropped:
            close(linear[name.split("/")[1]][index], g[name], rtol=1e-12)
    cosine = pixel_vit.noise_betas("cosine")
    close(cosine[index], g["cos1000/betas"], rtol=1e-12)
    close(np.cumprod(1 - cosine)[index], g["cos1000/alphas_cumprod"], rtol=1e-12)
    for count in (250, 50, 10, 7, 1):
        assert pixel_vit.space_timesteps(count) == g[f"steps/1000/{count}"].tolist()
    steps = pixel_vit.space_timesteps(int(g["resp"]))
    ten = pixel_vit.diffusion_tables(betas, steps)
    for name in (n for n in g.files if n.startswith("resp10/") and "map" not in n):
        close(ten[name.split("/")[1]], g[name], rtol=1e-12)
    np.testing.assert_array_equal(steps, g["resp10/timestep_map"])
    spaced = pixel_vit.diffusion_tables(betas, pixel_vit.space_timesteps(250))["betas"]
    close(np.append(spaced[:5], spaced[-5:]), g["resp250/betas_first5_last5"], rtol=1e-12)


def test_denoising_step():
    g, d = golden("gaussian_diffusion"), Diffusion("linear")
    model, _ = dit("pixel")
    x_start, noise, t, y = (tensor(g[k]) for k in ("x_start", "noise", "t", "y"))
    x = d.q_sample(x_start, t, noise)
    close(x, g["q_sample"], atol=1e-6)
    near(d.posterior_mean(x_start, x, t), g["q_posterior_mean"])
    found = d.posterior_log_variance_clipped[t].flatten()
    close(found, g["q_posterior_log_variance"].reshape(len(t), -1)[:, 0], rtol=1e-6)
    output = model.predict(x, t, y)
    for clip in (False, True):
        names = ("mean", "log_variance", "pred_xstart")
        for value, name in zip(d.denoise(*output, x, t, clip), names, strict=True):
            near(value, g[f"p_mean_variance_clip{int(clip)}/{name}"])
    found = pixel_vit.log_likelihood(x_start, 0.3 * noise, torch.tensor(-1.0))
    close(found, g["discretized_ll"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["default", "respaced"])
def test_diffusion_loss(variant):
    g = golden("gaussian_diffusion")
    d = Diffusion("linear", 10 if variant == "respaced" else 1000)
    model, _ = dit("pixel")
    model.requires_grad_(True)
    x_start, noise, y = (tensor(g[k]) for k in ("x_start", "noise", "y"))
    k = tensor(g["resp_t" if variant == "respaced" else "t"])
    x = d.q_sample(x_start, k, noise)
    output = model.predict(x, d.timestep_map[k], y)
    mse, bound = d.losses(*output, x_start, x, k, noise)
    terms = {"mse": mse, "vb": bound, "loss": mse + bound}
    for name, value in terms.items():
        close(value, g[f"loss_{variant}/{name}"], rtol=1e-4, atol=1e-7)
    norms = gradient_norms(model, terms["loss"].mean(), g["gradnorm_names"])
    close(norms, g[f"loss_{variant}/gradnorm"], rtol=1e-4, atol=1e-9)
    if variant == "default":
        assert model(x_start, y, k, noise) == terms["loss"].mean()


@pytest.mark.parametrize("name", ["noclip", "clip", "guided"])
def test_sampler(name):
    g, d = golden("gaussian_diffusion"), Diffusion("linear", 10)
    model, _ = dit("pixel")
    y = tensor(g["sample_y"])
    scale, key = 1.0, "sample_step_noise"
    if name == "guided":
        scale, key = float(g["cfg_sample_scale"]), "cfg_sample_step_noise"
    noise = iter(tensor(g[key])[:, :2])
    seen = []  # what the network is given and returns, step by step

    def network(x, t):
        seen.append((x, pixel_vit.guided(model, x, t, y, scale)))
        return seen[-1][1]

    start = tensor(g["sample_zT"])
    sample = pixel_vit.sample_loop(d, network, start, lambda: next(noise), name != "noclip")
    if name == "guided":
        near(sample, g["cfg_sample_full"][:2])
    else:
        near(sample, g[f"sample_ddpm_{name}"])
    if name == "clip":
        for i in range(3):
            near(seen[i + 1][0], g["traj_ddpm_clip_sample"][i])
            k = torch.full((2,), 9 - i)
            x_start = d.denoise(*seen[i][1], seen[i][0], k, clip=True)[2]
            near(x_start, g["traj_ddpm_clip_pred_xstart"][i])


def test_frechet_distance():
    g = golden("gen_metrics")
    real, fake = tensor(g["feat_real"]), tensor(g["feat_fake"])
    distance = pixel_vit.frechet_distance(real, fake)
    assert distance == pytest.approx(float(g["fd"]), rel=1e-8)
    assert distance == pytest.approx(float(g["fd_scipy_sqrtm"]), rel=1e-8)
    n = int(g["singular_n"])
    few = pixel_vit.frechet_distance(real[:n], fake[:n])
    assert few == pytest.approx(float(g["fd_singular"]), rel=1e-5)


# ---------------------------------------------------------------------------------- own promises

TINY = "--image-size 8 --width 16 --depth 2 --heads 2 --batch 16 --micro 8 --device cpu "
TINY += "--no-compile --log-every 1 --precision fp32 --workers 0 --eval none "
MAE = "--task mae --decoder-width 16 --decoder-heads 2 --decoder-depth 1 "
TASKS = {
    "classify": "--randaugment 2 --mixup 0.8 --cutmix 1 --smoothing 0.1 --erase 0.5 "
    "--drop-path 0.3 --jitter 0.4 --grey 0.2",
    "diffusion": "--preset toy-diffusion --sampler-steps 4 --samples 12",
}
FOUR_STEPS = "--steps 4 --lr 1e-5 --lr-start 1e-5 --flip "


def main(*flags, code=None):
    """Call the command line in this process, on one thread; expect it to leave with `code`."""
    words = " ".join(map(str, flags)).split()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if code is None:
            return pixel_vit.main(words)
        with pytest.raises(SystemExit) as stop:
            pixel_vit.main(words)
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


def losses(out):
    return [row["loss"] for row in log_rows(out) if "loss" in row]


@pytest.mark.parametrize("task", TASKS)
def test_stopped_and_resumed_is_bitwise(task, monkeypatch):
    flags = [TINY, TASKS[task], "--steps 6"]
    main(*flags, "--out whole")
    log = common.Run.log

    def ask_at_three(run, **row):  # as a signal would
        run.signalled = run.step == 3
        log(run, **row)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "log", ask_at_three)
        main(*flags, "--out parts", code=0)
    assert torch.load("parts/last.pt", weights_only=True)["step"] == 3
    main(*flags, "--out parts --resume --workers 1")
    assert largest_difference("whole", "parts") == 0
    assert losses("whole") == losses("parts")


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Return a folder with runs of the tasks on two ranks, plain and sharded."""
    folder, lines = tmp_path_factory.mktemp("ranks"), []
    for task, flags in TASKS.items():
        line = f"pixel_vit {TINY} {flags} {FOUR_STEPS} --out {folder}/{task}"
        samples = "--eval samples" if task == "diffusion" else ""
        lines += [f"{line}/shard --shard", f"{line}/two {samples}"]
    run_several(*lines, ranks=2)
    return folder


@pytest.mark.xdist_group("pixel_vit ranks")
@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_are_one_process(task, on_two_ranks):
    samples = "--eval samples" if task == "diffusion" else ""
    main(TINY, TASKS[task], FOUR_STEPS, "--out one", samples)
    for other in (on_two_ranks / task / "two", on_two_ranks / task / "shard"):
        assert largest_difference("one", other) < 1e-5
        assert losses(other) == pytest.approx(losses("one"), rel=5e-5)
    if task == "diffusion":
        found = [np.load(Path(out) / "samples.npz") for out in ("one", on_two_ranks / task / "two")]
        one, two = (file["arr_0"].astype(int) for file in found)
        assert one.shape == (12, 8, 8, 3) and np.abs(one - two).max() <= 1
        numbers = [i % 10 for i in range(12)]
        assert found[0]["labels"].tolist() == found[1]["labels"].tolist() == numbers


def test_samples_come_in_micro_batches():
    """A sample depends on the seed and its micro-batch only; classes take turns."""
    shape = {"image_size": 4, "width": 16, "depth": 2, "heads": 2, "classes": 3}
    config = Config(task="diffusion", sampler_steps=5, micro=4, samples=10, **shape)
    model = pixel_vit.build(config)[1]
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    split = pixel_vit.sample_split(model, config, ALONE, None)
    assert len(split) == 10 and split.labels.tolist() == [i % 3 for i in range(10)]
    images = torch.tensor(np.stack(split.images)).int().permute(0, 3, 1, 2)
    second = pixel_vit.sample_images(model, config, 1, ALONE).int()
    assert torch.equal(images[4:8], second)
    given = []
    model.predict = lambda x, t, labels: given.append(labels) or (x, x)
    pixel_vit.sample_images(model, config, 1, ALONE)
    assert given[0].tolist() == [1, 2, 0, 1] + 4 * [3], "the last four are guided by no class"
    del model.predict
    other = pixel_vit.sample_images(model, replace(config, seed=1), 1, ALONE)
    assert (other.int() - second).abs().float().mean() > 5


def test_guidance_uses_the_label_that_is_none():
    model, _ = dit("pixel")
    x, t, y = torch.randn(2, 3, 4, 4), torch.tensor([5, 500]), torch.tensor([1, 2])
    (plain, logits), (null, _) = model.predict(x, t, y), model.predict(x, t, torch.tensor([7, 7]))
    found = pixel_vit.guided(model, x, t, y, 3.0)
    torch.testing.assert_close(found[0], null + 3 * (plain - null), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], logits, atol=1e-5, rtol=1e-5)


def test_augmentation():
    """RandAugment leaves a quarter of the images alone; erasing keeps to its areas."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    config = Config(randaugment=2)
    same = [
        pixel_vit.augment(image, config, random).tobytes() == image.tobytes() for _ in range(800)
    ]
    assert 0.25 < np.mean(same) < 0.35  # some operations change nothing
    assert pixel_vit.augment(image, Config(), random).tobytes() == image.tobytes()
    grey = np.asarray(pixel_vit.augment(image, Config(grey=1.0), random))
    assert (grey == grey[..., :1]).all()
    shares = []
    for _ in range(300):
        pixels = torch.full((3, 32, 32), 256 // 2, dtype=torch.uint8)
        pixel_vit.erase(pixels, random)
        shares.append((pixels != 128).any(0).float().mean().item())
    assert 0.01 < min(shares) and max(shares) < 0.36


def test_hue_turns_by_up_to_the_strength():
    """The paper's jitter of 0.4 is +-0.4 of the circle."""
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    random = np.random.default_rng(0)
    turned = pixel_vit.shift_hue(red, 1 / 3).getpixel((0, 0))
    assert turned[1] > 240 and max(turned[0], turned[2]) < 12
    hues = []
    for _ in range(400):
        image = pixel_vit.augment(red, Config(jitter=0.4), random)
        hues.append(np.asarray(image.convert("HSV"))[0, 0, 0] / 255)
    turns = np.array([hue - (hue > 0.5) for hue in hues])
    assert turns.min() < -0.38 and turns.max() > 0.38 and np.abs(turns).max() < 0.42


def test_pixels_trade_places():
    for pairs, distance in ((0, 1000), (5, 1000), (72, 1000), (20, 2)):
        config = Config(image_size=12, permute=pairs, permute_distance=distance, seed=1)
        order = pixel_vit.pixel_permutation(config)
        assert sorted(order.tolist()) == list(range(144))
        assert torch.equal(order[order], torch.arange(144)), "each pixel moves once at most"
        moved = (order != torch.arange(144)).nonzero()[:, 0]
        assert len(moved) == 2 * pairs
        rows, columns = moved // 12 - order[moved] // 12, moved % 12 - order[moved] % 12
        if pairs:
            assert 0 < (rows.abs() + columns.abs()).min()
            assert (rows.abs() + columns.abs()).max() <= distance
    main(TINY, "--steps 1 --permute 9 --out permuted")
    model, config = pixel_vit.load_model("permuted/last.pt")
    assert config.permute == 9
    assert torch.equal(model.permutation, pixel_vit.pixel_permutation(config))


COUNTS = {
    "dit_xl2": (1000, 675_129_632, 0),
    "dit_l2": (1000, 458_102_816, 0),
    "dit_l1": (1000, 458_852_360, 0),
    "mae_b16_finetune": (1000, 86_567_656, 0),
    "vit_t1_cifar100": (100, 5.56e6, 5e3),
    "vit_s1_cifar100": (100, 21.73e6, 5e3),
    # MAE's encoders: ViT-B/16, ViT-L/16 and ViT-H/14 without head, 85.80, 303.30 and 630.76 M
    "mae_b16": (1000, 85_798_656, 0),
    "mae_l16": (1000, 303_301_632, 0),
    "mae_h14": (1000, 630_764_800, 0),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_parameters_are_those_of_the_paper(preset):
    classes, expected, tolerance = COUNTS[preset]
    flags = ["--preset", preset]
    config, _ = common.parse_config(Config, pixel_vit.PRESETS, pixel_vit.DATA_PRESETS, flags)
    config = replace(config, classes=classes)
    with torch.device("meta"):
        model = pixel_vit.TASKS[config.task](config)
    parameters = model.named_parameters()
    if config.task == "mae":
        parameters = [(n, p) for n, p in parameters if not n.startswith(("decoder", "mask"))]
    parameters = dict(parameters)
    assert sum(p.numel() for p in parameters.values()) == pytest.approx(expected, abs=tolerance)
    fixed = preset.startswith("mae") and "finetune" not in preset or preset in ("dit_l2", "dit_xl2")
    assert model.pos_embed.requires_grad != fixed
    if preset == "mae_b16_finetune":
        assert all(p.requires_grad for p in parameters.values())
        rule = pixel_vit.parameter_rule("pos_embed", 3, 12, 0.65, model.undecayed)
        assert rule == (pytest.approx(0.65**13), False)


def test_work_is_that_of_the_paper():
    """Multiply-adds of the specification's table; MAE counts visible tokens and the decoder."""
    tiny = Config(image_size=32, classes=100, **pixel_vit.TINY)
    large = Config(image_size=256, downsample=8, channels=4, **pixel_vit.LARGE)
    mae = Config(image_size=32, decoder_width=128, decoder_depth=4, **pixel_vit.TINY)
    with torch.device("meta"):
        assert pixel_vit.Classifier(tiny).work / 1e9 == pytest.approx(10.3, rel=0.02)
        assert pixel_vit.DiT(large).work / 1e9 == pytest.approx(360, rel=0.02)
        encoder = 12 * (12 * 257 * 192**2 + 2 * 257**2 * 192)
        decoder = 4 * (12 * 1025 * 128**2 + 2 * 1025**2 * 128)
        assert pixel_vit.MAE(mae).work == encoder + decoder


# ----------------------------------------------------------------------------------- checkpoints


def test_mae_becomes_a_classifier(capsys):
    """Pretrain, then tune: the trunk is the MAE's, the head starts at nearly nothing."""
    main(TINY, MAE, "--steps 1 --positions sincos --out mae")
    flags = "--preset toy --init mae/last.pt --steps 1 --lr 0 --eval accuracy"
    main(TINY, flags, "--out tuned")
    before, after = weights("mae"), weights("tuned")
    for name in ("pos_embed", "blocks.1.mlp.fc1.weight", "cls_token"):
        assert torch.equal(before[name], after[name])
    assert after["head.weight"].abs().max() < 1e-4 and after["head.weight"].any()
    assert "norm.weight" not in after
    assert "top-1" in log_rows("tuned")[-1]["eval"]["trained"]
    main(TINY, flags, "--lr 1e-3 --image-size 12 --out larger")
    assert "interpolated" in capsys.readouterr().out
    assert weights("larger")["pos_embed"].shape == (1, 145, 16)
    steps = {"toy": {**pixel_vit.PRESETS["toy"], "steps": 2}}
    with pytest.MonkeyPatch.context() as patch:  # no length was typed: the preset's
        patch.setitem(pixel_vit.PRESETS, "toy", steps["toy"])
        main(TINY, "--preset toy --init mae/last.pt --out untyped")
    trained = weights("untyped")
    assert len(losses("untyped")) == 2
    assert not torch.equal(trained["pos_embed"], before["pos_embed"]), "it is trained too"


def test_official_checkpoints_with_arguments_and_other_heads():
    """MAE's files of pretraining and training (with a Namespace), DiT's with `ema` and prefixes."""
    state = torch.load(GOLDEN / "mae_pixel_ckpt.pth", weights_only=True)["model"]
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, "encoder.pth")
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3}, "training.pth")
    g = golden("mae_pixel")
    images = tensor(g["imgs"])
    for path in ("encoder.pth", "training.pth"):
        model, _ = pixel_vit.load_model(path, heads=3)
        close(model.tokens(images), g["plain_tokens_norm"], atol=1e-5)
    model, config = pixel_vit.load_model("encoder.pth", heads=3, task="classify", classes=5)
    close(before_norm(model, images), g["plain_tokens_prenorm"], atol=1e-5)
    state = torch.load(GOLDEN / "dit_pixel_ckpt.pt", weights_only=True)
    state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"ema": state, "opt": {}, "args": argparse.Namespace()}, "dit.pt")
    model, _ = pixel_vit.load_model("dit.pt", heads=3)
    g = golden("dit")
    output = torch.cat(model.predict(*(tensor(g[f"dit1_{k}"]) for k in "xty")), 1)
    close(output, g["dit1_out"], atol=1e-5)
    flags = "--no-train --device cpu --heads 3 --workers 0"
    main(flags, "--init dit.pt --samples 3 --sampler-steps 3 --out sampled")
    assert np.load("sampled/samples.npz")["arr_0"].shape == (3, 4, 4, 3)
    main(flags, "--init encoder.pth --eval features --out features")
    found = np.load("features/features.npz")
    assert found["features"].shape == (2000, 12)
    with pytest.raises(SystemExit):
        pixel_vit.load_model("encoder.pth")  # 12 channels: how many heads?


def test_the_hubs_encoder():
    g = np.load(HUB / "expected.npz")
    model, config = pixel_vit.load_model(HUB / "model.safetensors", heads=2)
    assert (config.image_size, config.patch, config.depth) == (32, 8, 3)
    close(model.tokens(tensor(g["images"])), g["tokens"], atol=1e-5)


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
    main(TINY, "--steps 1 --out judge")
    flags = [TINY, "--preset toy-diffusion --codec codec.ts --channels 4 --downsample 2"]
    flags += ["--sampler-steps 3 --steps 2 --samples 12 --eval samples --judge judge/last.pt"]
    main(*flags, "--out latent")
    results = log_rows("latent")[-1]["eval"]
    assert {"real", "samples", "untrained"} <= results.keys()
    for result in results.values():
        assert math.isfinite(result["frechet"]) and "asked class, %" in result
    assert weights("latent")["x_embedder.proj.weight"].shape == (16, 4, 1, 1)
    capsys.readouterr()
    main(*flags, "--out wrong --codec absent", code=2)
    assert "TorchScript" in capsys.readouterr().err


def test_classifier_needs_labels_and_diffusion_does_not(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 255, (12, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "flat" / f"{i}.png")
    flags = [TINY, f"--data {tmp_path / 'flat'} --patch 1 --steps 2"]
    main(*flags, "--preset toy", code=2)
    assert "train/CLASS" in capsys.readouterr().err
    main(*flags, "--preset toy-diffusion --out d")
    assert weights("d")["y_embedder.embedding_table.weight"].shape == (1, 16)


# -------------------------------------------------------------------------------------- learning

HUES = np.random.default_rng(0).uniform(20, 235, (10, 3))
QUICK = "--image-size 6 --device cpu --no-compile --log-every 50 --precision fp32 --workers 0 "


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


def test_classifier_learns(halves):
    """In ten seconds: the half that matters is told from the other by learned positions."""
    main(QUICK, "--steps 200 --no-flip --eval accuracy --out learnt")
    results = log_rows("learnt")[-1]["eval"]
    assert results["random"]["top-1"] < 30
    assert results["trained"]["top-1"] > 80


def test_mae_learns():
    """In 20 seconds, on ramps of colour: hidden pixels are painted better than by the mean colour."""
    random = np.random.default_rng(0)
    x = np.linspace(-1, 1, 8)[:, None]
    for i in range(256):
        slopes = random.uniform(-60, 60, (2, 3))
        ramp = 128 + slopes[0] * x[:, None] + slopes[1] * x[None]  # [8, 8, 3]
        folder = Path("ramps", "train" if i < 192 else "val", "any")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp.astype(np.uint8)).save(folder / f"{i}.png")
    flags = (
        "--preset toy-mae --data ramps --image-size 8 --patch 2 --steps 600 --lr 4e-3 --workers 0"
    )
    main(flags, "--device cpu --no-compile --log-every 50 --eval reconstruction --out learnt")
    result = log_rows("learnt")[-1]["eval"]["trained"]
    assert result["hidden error x 100"] < 0.2 * result["of mean colour"]


def test_diffusion_learns(halves):
    """In 20 seconds: better than the best linear guess from a pixel alone; the class is heeded."""
    flags = "--preset toy-diffusion --steps 300 --ema 0.98 --no-flip --samples 96"
    main(QUICK, flags, "--out learnt")
    model, config = pixel_vit.load_model("learnt/last.pt")
    images = np.stack(common.TOYS["mosaics"]("val").images[:256])
    x_start = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    labels = torch.arange(256) % 10
    random = torch.Generator().manual_seed(0)
    k = torch.randint(1000, (256,), generator=random)
    noise = torch.randn(x_start.shape, generator=random)
    x = model.diffusion.q_sample(x_start, k, noise)
    with torch.no_grad():
        error = model.diffusion.losses(*model.predict(x, k, labels), x_start, x, k, noise)[0]
    share = model.diffusion.alphas_cumprod[k].flatten()
    power = share * x_start.var(0).mean()
    linear = power / (power + 1 - share)  # what is left of the noise's variance
    assert error.mean() < 0.5 * linear.mean()
    file = np.load("learnt/samples.npz")
    left = file["arr_0"][:, :, :3].mean((1, 2))  # [96, 3]
    taken = np.linalg.norm(left[:, None] - HUES, axis=2).argmin(1)
    assert (taken == file["labels"]).mean() > 0.5
