"""flexpredict.py against the reference's numbers (golden/flexpredict), and its own promises.

What it shares with ijepa.py byte for byte is tested there; what all scripts promise, in
test_runs.py.
"""

import functools
from dataclasses import replace
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, close, count, golden_tensors, log_rows
from PIL import Image
from test_runs import SCRIPTS, here, learn, photographs, refused, weights

import common
import flexpredict
from flexpredict import Config

OFFICIAL = GOLDEN / "flexpredict" / "tiny_stop.pth.tar"
SCRIPT = SCRIPTS["flexpredict"]
run = functools.partial(here, SCRIPT)
golden = functools.partial(golden_tensors, "flexpredict")
compare = functools.partial(helpers.compare, atol=1e-5)


def tiny(**fields):
    """Return (config, model, target) with the weights of the tiny official checkpoint."""
    read = flexpredict.read_weights(OFFICIAL, heads=4)
    config = Config(**read["fields"], **fields)
    model, target = flexpredict.build(config)
    flexpredict.load_weights(model, target, read, OFFICIAL)
    return config, model, target


def inputs():
    """Return (golden file, what a model takes: patches, context [B, K], targets [M, B, Kp])."""
    g = golden("forward")
    return g, (common.patchify(g.imgs, 4), g.masks_enc[0], g.masks_pred)


# ----------------------------------------------------------------------------------------- parity

GRADIENTS = {
    "predictor_embed_w": "predictor.predictor_embed.weight",
    "predictor_embed_b": "predictor.predictor_embed.bias",
    "enc_norm_w": "encoder.norm.weight",
    "patch_proj_w": "encoder.patch_embed.proj.weight",
    "enc_qkv0": "encoder.blocks.0.attn.qkv.weight",
    "pred_proj_w": "predictor.predictor_proj.weight",
    "pred_qkv0": "predictor.predictor_blocks.0.attn.qkv.weight",
}


def test_forward_loss_and_gradients():
    """The gradient of W, predictor_embed, is that of both its uses: context and noise."""
    g, (patches, context, targets) = inputs()
    _, model, target = tiny()
    predictor = model.predictor
    compare(g, atol=1e-6, pos_embed=target.pos_embed[0])
    compare(g, atol=1e-6, pred_pos_embed=predictor.predictor_pos_embed[0])
    tokens = target(patches)
    predictions = model(patches, context, targets, g.noise)
    compare(g, target_tokens=tokens, pred_code=predictions)
    compare(g, enc_ctx=model.encoder(patches, keep=context))
    compare(g, targets=F.layer_norm(common.gather_tokens(tokens, targets), (20,)))
    loss = flexpredict.jepa_loss(predictions, tokens, targets)
    loss.backward()
    embedding = predictor.predictor_embed.weight
    compare(g, atol=1e-6, loss=loss, grad_predictor_embed_w=embedding.grad)
    for name, parameter in GRADIENTS.items():
        close(model.get_parameter(parameter).grad.norm(), g[f"gn_{name}"], rtol=1e-4)
    assert predictor.mask_token.grad is None
    pooled = flexpredict.encode(target, g.imgs).transpose(0, 1)  # [2 blocks, B, D]
    compare(g, target_pooled=pooled[-1], target_blocks_pooled=pooled)
    target.norm = torch.nn.Identity()
    pooled = flexpredict.encode(target, g.imgs).transpose(0, 1)
    compare(g, target_blocks_pooled_nonorm=pooled)


def test_the_papers_and_the_exact_variant():
    g, batch = inputs()
    compare(g, pred_paper=tiny(mode="stop_paper")[1](*batch, g.noise))
    config, model, _ = tiny(mode="ijepa")
    assert flexpredict.draw_noise(config, 0, 11, "cpu") is None
    compare(g, pred_ijepa=model(*batch))
    model.predictor.mask_token.data.zero_()
    compare(g, pred_nostop=model(*batch))
    model = tiny()[1]  # no noise asks about the mean position
    close(model(*batch), model(*batch, 0 * g.noise), atol=1e-5)


def test_noise_has_the_covariance_of_the_released_code():
    g = golden("cov")
    config, model, _ = tiny(sigma=float(g.sigma), micro=2500)
    weight = model.predictor.predictor_embed.weight.detach()
    compare(g, atol=1e-6, cov_expected=g.sigma**2 * weight @ weight.T)
    noise, other = (flexpredict.draw_noise(config, i, 20, "cpu") for i in range(2))
    assert noise.shape == (4, 2500, 20, 20) and (noise != other).all()
    positions = flexpredict.stochastic_positions(torch.ones(16), noise, weight)
    found = torch.cov(positions.flatten(0, 2).T)
    largest = float(g.cov_expected.max())
    compare(g, atol=0.03 * largest, cov_expected=found, cov_mc=found)
    assert (found - g.cov_paper_literal).abs().max() > largest


def test_three_training_steps():
    """Noise, loss, schedules, AdamW and EMA together, against three steps of the reference."""
    _, (patches, context, targets) = inputs()
    g = golden("train_trace")
    start, peak, final, wd, wd_final, ipe, epochs, warmup = g.schedule.tolist()
    rates = {"lr_start": start, "lr": peak, "lr_final": final, "warmup": warmup / epochs}
    rates.update(weight_decay=wd, weight_decay_final=wd_final, momentum=0.996)
    config, model, target = tiny(**rates)
    optimizer = flexpredict.make_optimizer(model)
    ema = common.EMA(target, model.encoder)
    for step in range(3):
        lr, wd, m = flexpredict.schedules(config, step, int(ipe * epochs))
        compare(g, atol=1e-12, at=step, lr=lr, wd=wd, m=m)
        common.set_rates(optimizer, lr, wd)
        predictions = model(patches, context, targets, g.noise[step])
        loss = flexpredict.jepa_loss(predictions, target(patches), targets)
        close(loss, g.losses[step], rtol=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(m, torch.ones(()))
    parts = {"enc": (model.encoder, g.enc_keys), "pred": (model.predictor, g.pred_keys)}
    parts["tgt"] = (target, g.enc_keys)
    for name, (module, keys) in parts.items():
        state = module.state_dict()
        weights = [state[key] for key in keys]
        found = torch.tensor([[x.sum(), x.abs().sum()] for x in weights])
        scale = found[:, 1:].clamp(min=1e-8)
        close(found / scale, g[f"{name}_sums"] / scale, atol=1e-4)


@pytest.mark.parametrize("name", ["b16", "h16"])
def test_schedules_to_the_last_step(name):
    g = golden("schedules")
    config = Config(**flexpredict.PRESETS[f"vit_{name}_in1k"])
    for i, step in enumerate(g[f"{name}_step"].tolist()):
        lr, wd, ema = flexpredict.schedules(config, step - 1, int(config.epochs * g.ipe))
        compare(g, f"{name}_", atol=1e-12, at=i, lr=lr, wd=wd, ema=ema)


def test_masks():
    """Block sizes, golden masks from their blocks, statistics. The sampler is ijepa.py's."""
    g = golden("masks")
    config = Config(image_size=224, patch=16, released=True, min_context=11, batch=8, micro=8)
    sizes = [flexpredict.block_sizes(config, step) for step in range(200)]
    compare(g, sizes_by_seed=torch.tensor(sizes).flatten(1))
    for call, (size, context_size) in enumerate(sizes[:3]):
        targets = g[f"draw{call}_pred"]  # [M, B, Kp]
        first = targets[..., 0]  # the top left corner
        blocks = flexpredict.rectangles(first // 14, first % 14, size, 14)
        close(blocks.nonzero()[:, 2].view(targets.shape), targets)
        # each context is a block without the targets, cut to its first patches
        places = torch.cartesian_prod(*(torch.arange(14 - side) for side in context_size)).T
        options = flexpredict.rectangles(*places, context_size, 14)
        for taken, context in zip(blocks.any(0), g[f"draw{call}_enc"][0], strict=True):
            cut = [option.nonzero()[: len(context), 0] for option in options & ~taken]
            assert any(torch.equal(indices, context) for indices in cut)
    draws = [flexpredict.sample_masks(replace(config, seed=i % 4), i // 4) for i in range(1600)]
    contexts, targets = zip(*draws, strict=True)
    lengths = np.array([x.shape[1] for x in contexts])
    asked = np.array([x.shape[2] for x in targets])
    unions = [F.one_hot(x, 196).amax((0, 2)) for x in targets]
    unions = torch.stack(unions).double()
    covered = torch.cat([x.flatten() for x in contexts]).bincount(minlength=196) / 12800
    compare(g, stat_pred_kept_per_iter=asked[::4])
    compare(g, rtol=0.02, stat_ctx_mean=lengths.mean(), stat_pred_mean=asked.mean())
    compare(g, rtol=0.02, stat_union_mean=unions.sum(2).mean())
    compare(g, atol=0.03, stat_ctx_freq=covered.view(14, 14))
    compare(g, atol=0.03, stat_pred_union_freq=unions.mean((0, 1)).view(14, 14))


def test_low_shot():
    g = golden("lowshot")
    train, val = map(flexpredict.standardise, (g.Xt, g.Xv))
    weight = flexpredict.logistic_regression(train, g.yt, 4, g.lambd)
    logits = train @ weight.T
    val_logits = val @ weight.T
    objective = F.cross_entropy(logits, g.yt) + g.lambd / 120 * weight.square().sum()
    compare(g, atol=1e-4, objective=objective)
    compare(g, atol=1e-3, W=weight)
    compare(g, atol=1e-2, train_logits=logits, val_logits=val_logits)
    found = [common.top1(logits, g.yt), common.top1(val_logits, g.yv)]
    compare(g, train_acc=found[0] / 100, val_acc=found[1] / 100)
    assert (flexpredict.standardise(torch.ones(5, 2)) == 0).all()


def test_label_propagation():
    g = golden("labelprop")
    first = F.one_hot(g.first_labels.long()).permute(2, 0, 1)
    settings = (int(g[name]) for name in ("n_last", "radius", "topk"))
    soft = flexpredict.propagate_labels(g.feats.unflatten(1, (6, 7)), first, *settings)
    labels = flexpredict.label_maps(soft, int(g.patch), (24, 28))
    compare(g, first_onehot=first, seg=soft, argmax_up=labels)


def test_region_and_contour():
    g = golden("jf")
    means = []
    for i in (1, 2):
        true = g.gt == i
        values = flexpredict.region_and_contour(g.pred == i, true)
        statistics = flexpredict.sequence_statistics(values[1:-1])
        means.append(statistics[0].mean())
        for j, name in enumerate("JF"):
            found = {name: values[:, j], f"{name}_stats": statistics[:, j]}
            compare(g, atol=1e-9, at=i - 1, **found)
    boundary = flexpredict.boundary(g.gt == 1)[0]
    compare(g, atol=1e-9, JF_mean=np.mean(means), bmap0=boundary)
    empty = torch.zeros(1, 9, 9, dtype=torch.bool)
    assert (flexpredict.region_and_contour(empty, empty) == 1).all()
    line = torch.eye(9, dtype=torch.bool)[None]
    assert (flexpredict.region_and_contour(empty, line) == 0).all()


SIZES = {  # encoder parameters, position tables counted
    "vit_b16_in1k": 85_797_120,
    "vit_l16_in1k": 303_299_584,
    "vit_h16_in1k": 630_915_840,
}


def test_paper_presets_have_the_papers_sizes():
    for name, expected in SIZES.items():
        with torch.device("meta"):
            model = flexpredict.FlexPredict(Config(**flexpredict.PRESETS[name]))
        assert count(model.encoder) == expected


def test_mirrored_grey_and_blurred_views():
    random = common.generator("views")
    pixels = torch.randint(0, 256, (200, 3, 24, 24), dtype=torch.uint8, generator=random)

    def change(**fields):
        """Return (views, which differ from the images)."""
        views = pixels.clone()
        flexpredict.augment(views, Config(**fields), random)
        return views, (views != pixels).flatten(1).any(1)

    assert not change()[1].any()
    views, changed = change(flip=True)
    assert 70 < changed.sum() < 130 and torch.equal(views[changed], pixels[changed].flip(3))
    views, changed = change(grey=0.3)
    assert 40 < changed.sum() < 80 and (views[changed] == views[changed, :1]).all()
    views, changed = change(blur=0.7)
    spread = views[changed].float().std((1, 2, 3))
    before = pixels[changed].float().std((1, 2, 3))
    assert 100 < changed.sum() < 160 and (spread < before).all()


# ------------------------------------------------------------------------------------- evaluation


def test_toy_scenes_are_what_their_labels_say():
    pixels, labels = flexpredict.toy_scenes(20, 48, frames=8)
    means = [pixels[labels == label].mean() for label in range(3)]
    close(np.subtract(means, means[0]), [0, 40, -40], atol=10)
    areas = (labels == 2).mean((2, 3))
    assert abs(areas - np.pi * 0.18**2).max() < 0.01, "always whole"
    val = common.open_split("scenes", "val")
    assert len(val) == 2000 and val.images[0].size == (24, 24)


def test_video_evaluation_of_a_perfect_and_of_a_blind_encoder():
    """Tokens that say which object covers how much of a patch score high; equal ones cannot."""
    _, labels = next(flexpredict.toy_videos(24))
    shares = F.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    perfect = F.avg_pool2d(shares, 4).permute(0, 2, 3, 1)  # [T, h, w, 3]
    seen, blind = (flexpredict.segment_video(x, labels, 4) for x in (perfect, 0 * perfect + 1))
    assert seen.shape == (2, 3, 2)
    assert seen[:, 0, 0].mean() > 0.6 > blind[:, 0, 0].mean() + 0.2


def davis(root, mode="P", value=1, frames=6):
    """Write a DAVIS folder of one sequence, `ball`, a bright square that moves to the right."""
    folders = [root / kind / "480p/ball" for kind in ("JPEGImages", "Annotations")]
    folders.append(root / "ImageSets/2017")
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[2] / "val.txt").write_text("ball")
    for i in range(frames):
        square = np.zeros((96, 128), np.uint8)
        square[30:70, 20 + 8 * i : 60 + 8 * i] = 1
        Image.fromarray(200 * square).save(folders[0] / f"{i}.jpg")
        mask = Image.fromarray(value * square)
        if mode == "P":
            mask.putpalette([0, 0, 0, 128, 0, 0])
        mask.convert(mode).save(folders[1] / f"{i}.png")
    return root


def test_davis_folder(tmp_path):
    """Binary masks are as good as a palette's, 255 is background."""
    flags = "--steps 1 --min-context 1 --image-size 64 --patch 16 --eval video --davis"
    run(SCRIPT.small, flags, davis(tmp_path / "davis"), "--out run")
    result = log_rows("run")[-1]["eval"]["trained"]
    assert 30 < result["J&F"] <= 100
    close(result["J&F"], (result["J"] + result["F"]) / 2, atol=1e-4)
    videos = []
    for folder in (tmp_path / "davis", davis(tmp_path / "bits", mode="1", value=255)):
        (sequence,) = flexpredict.davis_sequences(folder)
        videos.append(flexpredict.read_video(sequence))
    (frames, labels), (_, same) = videos
    assert frames.shape == (6, 3, 480, 640)
    # std .228, as in the official evaluation
    close(frames[:, 0].median(), -0.485 / 0.228, atol=0.004)
    assert labels.unique().tolist() == [0, 1] and torch.equal(same, labels)
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save("void.png")
    assert flexpredict.read_mask("void.png").tolist() == [[0, 1, 0]]


def test_davis_folders_that_would_give_wrong_scores(tmp_path, capsys):
    """Colours are refused, and sequences that cannot be scored are named."""
    folders = {
        "RGB": davis(tmp_path / "colours", mode="RGB"),
        "255": davis(tmp_path / "davis2016", mode="L", value=255),
        "three frames": davis(tmp_path / "short", frames=2),
        "an object": davis(tmp_path / "empty", value=0),
        "3.png cannot be read": davis(tmp_path / "gap"),
        "4.png cannot be read": davis(tmp_path / "broken"),
        "val.txt": tmp_path / "nowhere",
    }
    (tmp_path / "gap/Annotations/480p/ball/3.png").unlink()
    (tmp_path / "broken/Annotations/480p/ball/4.png").write_bytes(b"cut off")
    cut = davis(tmp_path / "cut") / "JPEGImages/480p/ball/2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    for words, folder in folders.items():
        printed = refused(capsys, SCRIPT, SCRIPT.small, "--out refused --davis", folder)
        assert words in printed and ("ball" in printed) == folder.exists()
        assert not Path("refused").exists()
    flags = f"{SCRIPT.small} --steps 1 --eval video --davis {tmp_path / 'cut'}"
    assert f"{cut} cannot be read" in refused(capsys, SCRIPT, flags)


def test_official_checkpoint_in_features_out_and_trained_on(tmp_path, capsys):
    data = photographs(tmp_path / "photos")
    flags = f"--init {OFFICIAL} --heads 4 --device cpu --precision fp32 --data {data} --eval"
    run(flags, "features --no-train --tokens --out read --image-size 32")
    pixels = common.centre_crops(common.open_split(str(data), "val"), 32, range(12))[1]
    tokens = tiny()[2](common.normalize(pixels))
    compare(np.load("read/features.npz"), tokens=tokens, features=tokens.mean(1))
    flags += " none --image-size 24 --min-context 2 --steps 1 --batch 8 --micro 8"
    run(flags, "--lr 0 --lr-start 0 --lr-final 0 --out tuned")
    assert "interpolated" in capsys.readouterr().out
    state = weights("tuned")[1]
    for name, value in flexpredict.read_weights(OFFICIAL, heads=4)["model"].items():
        if "pos_embed" not in name:
            close(state[f"model.{name}"], value)
    assert flexpredict.read_weights("tuned/last.pt")["fields"]["mode"] == "stop"


def test_flexpredict_learns():
    """A tenth of the toy's run: features beat a random encoder's, and the noise stays."""
    flags = "--steps 200 --batch 32 --micro 32 --eval linear"
    *steps, _, evaluation = learn(SCRIPT, f"{flags} --probe-epochs 4 --workers 0")
    results = evaluation["eval"]
    assert results["trained"]["linear"] > results["random"]["linear"] + 8
    last = steps[-1]
    assert last["feature_std"] > 0.02 and last["feature_rank"] > 3, "collapsed"
    assert last["position_noise"] > 0.02, "the noise on positions was trained away"
