"""flexpredict.py against the reference's numbers (tests/golden/flexpredict) and its own promises.

What it shares with ijepa.py byte for byte is tested there; what all scripts promise, in
test_runs.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import log_rows
from PIL import Image
from test_runs import SCRIPTS, here, learn, photographs, refused, run_several, weights

import common
import flexpredict
from flexpredict import Config

GOLDEN = Path(__file__).parent / "golden" / "flexpredict"
OFFICIAL = GOLDEN / "tiny_stop.pth.tar"
TINY = {"image_size": 32, "patch": 4, "width": 20, "depth": 2, "heads": 4}
TINY.update(predictor_width=16, predictor_depth=2)


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=torch.float64):
    return torch.from_numpy(np.asarray(array)).to(dtype)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    actual = torch.as_tensor(actual).detach().double()
    torch.testing.assert_close(actual, tensor(expected), atol=atol, rtol=rtol)


def tiny(mode="stop"):
    """Return (model, target) with the weights of the official-layout tiny checkpoint."""
    model, target = flexpredict.build(Config(**TINY, mode=mode))
    flexpredict.load_weights(model, target, flexpredict.read_weights(OFFICIAL, heads=4), OFFICIAL)
    return model, target


def inputs():
    """Return (golden file, patches, context [B, K], targets [M, B, Kp], noise)."""
    g = golden("forward")
    patches = common.patchify(tensor(g["imgs"], torch.float32), 4)
    masks = [tensor(g[f"masks_{name}"], torch.long) for name in ("enc", "pred")]
    return g, patches, masks[0][0], masks[1], tensor(g["noise"], torch.float32)


# ----------------------------------------------------------------------------------------- parity


def test_encoders():
    g, patches, context, _, _ = inputs()
    model, target = tiny()
    images = tensor(g["imgs"], torch.float32)
    close(target.pos_embed[0], g["pos_embed"], atol=1e-6)
    close(model.predictor.predictor_pos_embed[0], g["pred_pos_embed"], atol=1e-6)
    close(target(images), g["target_tokens"], atol=1e-5)
    pooled = flexpredict.encode(target, images)  # [B, 2 blocks, D]
    close(pooled[:, -1], g["target_pooled"], atol=1e-5)
    close(pooled.transpose(0, 1), g["target_blocks_pooled"], atol=1e-5)
    first = target.blocks[0](target.embed(images))
    raw = torch.stack([first, target.blocks[1](first)]).mean(2)
    close(raw, g["target_blocks_pooled_nonorm"], atol=1e-5)
    close(model.encoder(patches, keep=context), g["enc_ctx"], atol=1e-5)


def test_predictor_loss_and_gradients():
    g, patches, context, targets, noise = inputs()
    model, target = tiny()
    predictions = model(patches, context, targets, noise)
    close(predictions, g["pred_code"], atol=1e-5)
    tokens = target(patches)
    wanted = common.gather_tokens(tokens, targets)
    close(F.layer_norm(wanted, wanted.shape[-1:]), g["targets"], atol=1e-5)
    loss = flexpredict.jepa_loss(predictions, tokens, targets)
    close(loss, g["loss"], atol=1e-6)
    loss.backward()
    encoder, predictor = model.encoder, model.predictor
    embed = predictor.predictor_embed
    norms = {
        "predictor_embed_w": embed.weight,
        "predictor_embed_b": embed.bias,
        "enc_norm_w": encoder.norm.weight,
        "patch_proj_w": encoder.patch_embed.proj.weight,
        "enc_qkv0": encoder.blocks[0].attn.qkv.weight,
        "pred_proj_w": predictor.predictor_proj.weight,
        "pred_qkv0": predictor.predictor_blocks[0].attn.qkv.weight,
    }
    for name, parameter in norms.items():
        close(parameter.grad.norm(), g[f"gn_{name}"], rtol=1e-4)
    close(embed.weight.grad, g["grad_predictor_embed_w"], atol=1e-6)
    assert predictor.mask_token.grad is None


def test_the_papers_and_the_exact_variant():
    g, patches, context, targets, noise = inputs()
    close(tiny("stop_paper")[0](patches, context, targets, noise), g["pred_paper"], atol=1e-5)
    model, _ = tiny("ijepa")
    close(model(patches, context, targets), g["pred_ijepa"], atol=1e-5)
    with torch.no_grad():
        model.predictor.mask_token.zero_()
    close(model(patches, context, targets), g["pred_nostop"], atol=1e-5)
    for mode in ("stop", "stop_paper"):  # no noise asks about the mean position
        model, _ = tiny(mode)
        zero = model(patches, context, targets, torch.zeros_like(noise))
        torch.testing.assert_close(model(patches, context, targets), zero)


def test_covariance_is_that_of_the_released_code():
    g = golden("cov")
    weight = tiny()[0].predictor.predictor_embed.weight.detach()
    sigma = float(g["sigma"])
    close(sigma**2 * weight @ weight.T, g["cov_expected"], atol=1e-6)
    config = Config(**TINY, sigma=sigma, micro=2500)
    noise = flexpredict.draw_noise(config, 0, 20, "cpu").flatten(0, 2)  # 200,000 of them
    positions = flexpredict.stochastic_positions(torch.ones(16), noise, weight)
    found = torch.cov((positions - 1).T.double())
    for expected in (g["cov_expected"], g["cov_mc"]):
        assert (found - tensor(expected)).abs().max() < 0.03 * expected.max()
    assert (found - tensor(g["cov_paper_literal"])).abs().max() > g["cov_expected"].max()


def test_three_training_steps():
    """Noise, loss, schedules, AdamW and EMA together, against three steps of the reference."""
    _, patches, context, targets, _ = inputs()
    g = golden("train_trace")
    model, target = tiny()
    start, peak, final, wd, wd_final, ipe, epochs, warmup = g["schedule"]
    config = Config(**TINY, lr=peak, lr_start=start, lr_final=final, warmup=warmup / epochs)
    config = replace(config, weight_decay=wd, weight_decay_final=wd_final, momentum=0.996)
    optimizer = flexpredict.make_optimizer(model)
    ema = common.EMA(target, model.encoder)
    for step in range(3):
        rates = flexpredict.schedules(config, step, int(ipe * epochs))
        close(rates, [g[k][step] for k in ("lr", "wd", "m")], atol=1e-12)
        common.set_rates(optimizer, *rates[:2])
        with torch.no_grad():
            tokens = target(patches)
        noise = tensor(g["noise"][step], torch.float32)
        loss = flexpredict.jepa_loss(model(patches, context, targets, noise), tokens, targets)
        close(loss, g["losses"][step], rtol=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(rates[2], torch.ones(()))
    parts = {"enc": model.encoder, "pred": model.predictor, "tgt": target}
    for part, module in parts.items():
        state, sums = module.state_dict(), g[f"{part}_sums"]
        names = g["pred_keys" if part == "pred" else "enc_keys"]
        assert set(names) == set(state)
        found = torch.stack([torch.stack([state[k].sum(), state[k].abs().sum()]) for k in names])
        assert (np.abs(found.double().numpy() - sums) <= 1e-4 * sums[:, 1:] + 1e-12).all()


@pytest.mark.parametrize("name", ["b16", "h16"])
def test_schedules_to_the_last_step(name):
    g = golden("schedules")
    config = Config(**flexpredict.PRESETS[f"vit_{name}_in1k"])
    steps = int(config.epochs * g["ipe"])
    found = [flexpredict.schedules(config, int(t) - 1, steps) for t in g[f"{name}_step"]]
    for values, key in zip(zip(*found, strict=True), ("lr", "wd", "ema"), strict=True):
        close(torch.tensor(values, dtype=torch.float64), g[f"{name}_{key}"], atol=1e-12)


def test_masks():
    """Block sizes, golden masks from their blocks, statistics. The sampler is ijepa.py's."""
    g = golden("masks")
    config = Config(image_size=224, patch=16, released=True, min_context=11, batch=8, micro=8)
    sizes = [sum(flexpredict.block_sizes(config, step), ()) for step in range(200)]
    np.testing.assert_array_equal(sizes, g["sizes_by_seed"])
    for call in range(3):
        expected = tensor(g[f"draw{call}_pred"], torch.long)  # [M, B, Kp]
        size, context_size = flexpredict.block_sizes(config, call)
        first = expected[..., 0]  # the top left corner
        blocks = flexpredict.rectangles(first // 14, first % 14, size, 14)
        assert torch.equal(blocks.nonzero()[:, 2].view(expected.shape), expected)
        # each context is its block without the targets, cut to its first patches
        taken = blocks.any(0)
        places = torch.cartesian_prod(*(torch.arange(14 - side) for side in context_size)).T
        for image, context in enumerate(tensor(g[f"draw{call}_enc"], torch.long)[0]):
            options = flexpredict.rectangles(*places, context_size, 14) & ~taken[image]
            cut = [option.nonzero()[: len(context), 0] for option in options]
            assert any(torch.equal(indices, context) for indices in cut)
    lengths, asked, unions = [], [], []
    cover, covered = torch.zeros(196), torch.zeros(196)
    for step in range(400):
        for seed in range(4):
            context, targets = flexpredict.sample_masks(replace(config, seed=seed), step)
            lengths.append(context.shape[-1])
            asked.append(targets.shape[-1])
            cover += torch.bincount(context.flatten(), minlength=196)
            union = torch.zeros(8, 196).scatter_(1, targets.transpose(0, 1).flatten(1), 1.0)
            unions.append(union.sum(1).mean())
            covered += union.sum(0)
    np.testing.assert_array_equal(asked[::4], g["stat_pred_kept_per_iter"])
    for values, key in ((lengths, "ctx"), (asked, "pred"), (unions, "union")):
        assert np.mean(values) == pytest.approx(float(g[f"stat_{key}_mean"]), rel=0.02)
    for found, key in ((cover, "ctx_freq"), (covered, "pred_union_freq")):
        difference = found.view(14, 14) / 4 / 3200 - tensor(g[f"stat_{key}"], torch.float32)
        assert difference.abs().max() < 0.03


def test_low_shot():
    g = golden("lowshot")
    labels, strength = tensor(g["yt"]).long(), float(g["lambd"])
    train, val = (flexpredict.standardise(tensor(g[name])) for name in ("Xt", "Xv"))
    weight = flexpredict.logistic_regression(train, labels, 4, strength)
    objective = F.cross_entropy(train @ weight.T, labels) + strength / 120 * weight.square().sum()
    close(objective, g["objective"], atol=1e-4)
    close(weight, g["W"], atol=1e-3)
    close(train @ weight.T, g["train_logits"], atol=1e-2)
    close(val @ weight.T, g["val_logits"], atol=1e-2)
    assert common.top1(train @ weight.T, labels) == pytest.approx(100 * float(g["train_acc"]))
    found = common.top1(val @ weight.T, tensor(g["yv"]).long())
    assert found == pytest.approx(100 * float(g["val_acc"]))
    assert flexpredict.standardise(torch.ones(5, 2)).eq(0).all()


def test_label_propagation():
    g = golden("labelprop")
    h, w = int(g["h"]), int(g["w"])
    features = tensor(g["feats"], torch.float32).unflatten(1, (h, w))
    first = F.one_hot(tensor(g["first_labels"], torch.long)).permute(2, 0, 1)
    np.testing.assert_array_equal(first, g["first_onehot"])
    settings = (int(g[name]) for name in ("n_last", "radius", "topk"))
    soft = flexpredict.propagate_labels(features, first, *settings)
    close(soft, g["seg"], atol=1e-5)
    patch = int(g["patch"])
    labels = flexpredict.label_maps(soft, patch, (h * patch, w * patch))
    np.testing.assert_array_equal(labels, g["argmax_up"])


def test_region_and_contour():
    g = golden("jf")
    true, predicted = torch.from_numpy(g["gt"]), torch.from_numpy(g["pred"])
    np.testing.assert_array_equal(flexpredict.boundary(true == 1)[0], g["bmap0"])
    means = []
    for i in (1, 2):
        values = flexpredict.region_and_contour(predicted == i, true == i)
        close(values[:, 0], g["J"][i - 1], atol=1e-9)
        close(values[:, 1], g["F"][i - 1], atol=1e-9)
        statistics = flexpredict.sequence_statistics(values[1:-1])
        close(statistics[:, 0], g["J_stats"][i - 1], atol=1e-9)
        close(statistics[:, 1], g["F_stats"][i - 1], atol=1e-9)
        means.append(statistics[0].mean())
    close(torch.stack(means).mean(), g["JF_mean"], atol=1e-9)
    empty, full = torch.zeros(1, 9, 9, dtype=torch.bool), torch.eye(9, dtype=torch.bool)[None]
    assert flexpredict.region_and_contour(empty, empty).eq(1).all()
    assert flexpredict.region_and_contour(empty, full).eq(0).all()


SIZES = {  # encoder parameters, position tables counted
    "vit_b16_in1k": 85_797_120,
    "vit_l16_in1k": 303_299_584,
    "vit_h16_in1k": 630_915_840,
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_presets_have_the_papers_sizes(name):
    presets = (flexpredict.PRESETS, flexpredict.DATA_PRESETS)
    config, _ = common.parse_config(Config, *presets, ["--preset", name])
    with torch.device("meta"):
        model = flexpredict.FlexPredict(config)
    assert sum(p.numel() for p in model.encoder.parameters()) == SIZES[name]


# ------------------------------------------------------------------------------------- the method


def test_the_noise_is_tied_to_the_context():
    """The gradient of W is that of its two uses: context and noise."""
    _, patches, context, targets, noise = inputs()
    model, target = tiny()
    tokens = target(patches)
    predictor = model.predictor
    embed = predictor.predictor_embed
    weight, bias = embed.weight.detach(), embed.bias.detach()
    masked_tokens = predictor.masked_tokens

    def gradient(cut):
        """W's gradient with one of its two uses detached."""
        model.zero_grad()
        if cut == "noise":
            predictor.masked_tokens = lambda p, n: flexpredict.stochastic_positions(
                p + bias, n, weight
            )
        if cut == "context":
            handle = embed.register_forward_hook(lambda _, x, out: F.linear(x[0], weight, bias))
        loss = flexpredict.jepa_loss(model(patches, context, targets, noise), tokens, targets)
        loss.backward()
        predictor.masked_tokens = masked_tokens
        if cut == "context":
            handle.remove()
        return [embed.weight.grad.clone(), embed.bias.grad.clone()]

    parts = (gradient(None), gradient("noise"), gradient("context"))
    for whole, of_context, tied in zip(*parts, strict=True):
        torch.testing.assert_close(whole, of_context + tied, atol=1e-7, rtol=1e-5)
        assert tied.norm() > 0.05 * whole.norm()


def test_noise_belongs_to_the_micro_batch():
    config = Config(micro=16, seed=3, sigma=0.5)
    noise = flexpredict.draw_noise(config, 7, 9, "cpu")
    assert noise.shape == (4, 16, 9, 64) and abs(noise.std().item() - 0.5) < 0.005
    assert torch.equal(flexpredict.draw_noise(config, 7, 9, "cpu"), noise)
    assert not torch.equal(flexpredict.draw_noise(config, 8, 9, "cpu"), noise)
    assert len(noise.unique()) > 0.99 * noise.numel(), "samples share noise"
    assert flexpredict.draw_noise(replace(config, mode="ijepa"), 7, 9, "cpu") is None


def test_grey_blurred_and_mirrored_views():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 3, 24, 24), generator=random, dtype=torch.uint8)
    views = pixels.clone()
    flexpredict.augment(views, Config(), random)
    assert torch.equal(views, pixels)
    flexpredict.augment(views, Config(grey=0.4, blur=0.6), random)
    grey = (views == views[:, :1]).flatten(1).all(1)
    change = views.float().diff(dim=3).abs().mean((1, 2, 3))
    smooth = change < 0.8 * pixels.float().diff(dim=3).abs().mean((1, 2, 3))
    same = (views == pixels).flatten(1).all(1)
    assert 12 <= grey.sum() <= 36 and 24 <= smooth.sum() <= 50 and 4 <= same.sum() <= 26
    views = pixels.clone()
    flexpredict.augment(views, Config(flip=True), random)
    mirrored = (views == pixels.flip(3)).flatten(1).all(1)
    assert 18 <= mirrored.sum() <= 42 and torch.equal(views[~mirrored], pixels[~mirrored])


# ------------------------------------------------------------------------------------- evaluation


def test_toy_scenes_are_what_their_labels_say():
    pixels, labels = flexpredict.toy_scenes(20, 48, frames=8)
    assert pixels.shape == labels.shape == (20, 8, 48, 48)
    for label, lighter in ((1, 40), (2, -40)):
        inside = pixels[labels == label].mean() - pixels[labels == 0].mean()
        assert abs(inside - lighter) < 10
    area = (labels == 2).mean((2, 3))
    assert np.allclose(area, np.pi * 0.18**2, atol=0.01), "the last disc is always whole"
    assert (labels[:, 1:] != labels[:, :-1]).any((2, 3)).all(), "everything moves"
    assert np.array_equal(pixels, flexpredict.toy_scenes(20, 48, frames=8)[0])
    val = common.open_split("scenes", "val")
    assert len(val) == 2000 and val.images[0].shape == (24, 24)


def test_video_evaluation_of_a_perfect_and_of_a_blind_encoder():
    """Tokens that say which object covers how much of a patch score high; equal ones cannot."""
    frames, labels = next(flexpredict.toy_videos(24))
    assert frames.shape == (12, 3, 48, 48) and labels.shape == (12, 48, 48)
    shares = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    seen = flexpredict.segment_video(F.avg_pool2d(shares, 4).permute(0, 2, 3, 1), labels, 4)
    blind = flexpredict.segment_video(torch.ones(12, 12, 12, 2), labels, 4)
    assert seen.shape == (2, 3, 2)
    assert seen[:, 0, 0].mean() > 0.6 > blind[:, 0, 0].mean() + 0.2


def davis(root, mode="P", value=1, frames=6, size=(128, 96)):
    """Write a DAVIS folder of one sequence, `ball`, a bright square that moves to the right."""
    for i in range(frames):
        picture = np.zeros(size[::-1], np.uint8)
        picture[30:70, 20 + 8 * i : 60 + 8 * i] = 1
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
            path = root / kind / "480p" / "ball" / f"{i:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == "jpg":
                Image.fromarray(picture * 200).convert("RGB").save(path)
            elif mode == "P":
                mask = Image.fromarray(picture * value)
                mask.putpalette([0, 0, 0, 128, 0, 0])
                mask.save(path)
            else:
                Image.fromarray(picture * value).convert(mode).save(path)
    (root / "ImageSets/2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets/2017/val.txt").write_text("ball\n")
    return root


def test_davis_folder(tmp_path):
    """A palette file and its binary twin have the same labels; noise as features scores low."""
    (sequence,) = flexpredict.davis_sequences(davis(tmp_path / "davis"))
    frames, labels = flexpredict.read_video(sequence)
    assert frames.shape == (6, 3, 480, 640)
    assert labels.shape == (6, 96, 128) and labels.unique().tolist() == [0, 1]
    # std .228, as in the official evaluation
    assert frames[:, 0].median().item() == pytest.approx(-0.485 / 0.228, abs=0.004)
    flags = f"--davis {tmp_path / 'davis'} --eval video --image-size 64 --patch 16 --out run"
    here(SCRIPTS["flexpredict"], SCRIPTS["flexpredict"].small, "--steps 1 --min-context 1", flags)
    result = log_rows("run")[-1]["eval"]["trained"]
    assert 30 < result["J&F"] <= 100
    assert result["J&F"] == pytest.approx((result["J"] + result["F"]) / 2, abs=1e-4)
    torch.manual_seed(0)
    noise = flexpredict.segment_video(torch.randn(6, 15, 20, 8), labels, 32)
    assert noise[:, 0, 0].mean() < 0.5
    (sequence,) = flexpredict.davis_sequences(davis(tmp_path / "bits", mode="1", value=255))
    assert torch.equal(flexpredict.read_video(sequence)[1], labels)


def test_davis_folders_that_would_give_wrong_scores(tmp_path, capsys):
    """255 is background, colours are refused, and sequences that cannot be scored are named."""
    script = SCRIPTS["flexpredict"]
    flags = [script.small.replace("--eval none", "--eval video"), "--out refused --davis"]
    masks = davis(tmp_path / "void", frames=6)
    mask = np.zeros((96, 128), np.uint8)
    mask[30:70, 20:60] = 1
    mask[:10] = 255
    Image.fromarray(mask).save(masks / "Annotations/480p/ball/00000.png")
    assert flexpredict.read_mask(masks / "Annotations/480p/ball/00000.png").unique().tolist() == [
        0,
        1,
    ]
    davis(tmp_path / "colours", mode="RGB")
    davis(tmp_path / "davis2016", value=255, mode="L")
    davis(tmp_path / "short", frames=2)
    davis(tmp_path / "empty", value=0)
    davis(tmp_path / "gap")
    (tmp_path / "gap/Annotations/480p/ball/00003.png").unlink()
    expected = {
        "colours": "RGB",
        "davis2016": "255",
        "short": "three frames",
        "empty": "an object",
        "gap": "a mask",
        "nowhere": "val.txt",
    }
    for name, words in expected.items():
        printed = refused(capsys, script, *flags, tmp_path / name)
        assert words in printed and (name == "nowhere" or "ball" in printed)
        assert not Path("refused").exists()


def test_all_evaluations_on_one_rank_and_on_two(tmp_path):
    data = photographs(tmp_path / "photos", count=25)
    flags = f"--data {data} --steps 1 --probe-epochs 2 --grey 0.3 --blur 0.3 --flip"
    flags = f"{SCRIPTS['flexpredict'].folder} {flags} --eval knn,linear,lowshot,video,features"
    here(SCRIPTS["flexpredict"], flags, "--out one")
    run_several(f"flexpredict {flags} --out two", ranks=2)
    for name in ("one", "two"):
        results = log_rows(name)[-1]["eval"]
        for network in ("trained", "random"):
            known = {"knn", "linear", "lowshot", "J&F", "J", "F recall", "J decay"}
            assert known <= results[network].keys()
        assert Image.open(f"{name}/picture.png").size[0] > 400
        assert np.load(f"{name}/features.npz")["features"].shape == (25, 16)
    one, two = (log_rows(name)[-1]["eval"]["trained"] for name in ("one", "two"))
    for key in ("knn", "linear", "lowshot", "J&F"):
        assert two[key] == pytest.approx(one[key], abs=9)  # two of 25 images
    assert log_rows("one")[0]["position_noise"] > 0


def test_official_checkpoint_in_features_out_and_trained_on(capsys):
    flags = (
        f"--init {OFFICIAL} --heads 4 --device cpu --precision fp32 --preset toy --data textures"
    )
    here(
        SCRIPTS["flexpredict"],
        flags,
        "--no-train --eval features --tokens --out read --image-size 32",
    )
    found = np.load("read/features.npz")
    assert found["tokens"].shape == (2000, 64, 20)
    split = common.open_split("textures", "val")
    crops = common.centre_crops(split, 32, [0, 1])[1]
    close(found["tokens"][:2], tiny()[1](common.normalize(crops)).detach(), atol=1e-5)
    flags += (
        " --image-size 24 --min-context 2 --steps 1 --eval none --lr 0 --lr-start 0 --lr-final 0"
    )
    here(SCRIPTS["flexpredict"], flags, "--out tuned")
    assert "interpolated" in capsys.readouterr().out
    _, state = weights("tuned")
    reference = flexpredict.read_weights(OFFICIAL, heads=4)["model"]
    for name, value in reference.items():
        if "pos_embed" not in name:
            np.testing.assert_array_equal(state[f"model.{name}"], value)
    assert flexpredict.read_weights("tuned/last.pt")["fields"]["mode"] == "stop"


def test_flexpredict_learns():
    """A quarter of the toy's run: features beat a random encoder's, and the noise stays."""
    rows = learn(SCRIPTS["flexpredict"], "--steps 250 --eval linear --probe-epochs 4 --workers 0")
    results = rows[-1]["eval"]
    assert results["trained"]["linear"] > results["random"]["linear"] + 8
    last = [row for row in rows if "feature_std" in row][-1]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
    assert last["position_noise"] > 0.02, "the noise on positions was trained away"
