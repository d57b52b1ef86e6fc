"""flexpredict.py against the numbers of the reference implementations (tests/golden/flexpredict) and its own promises.

What it shares with ijepa.py byte for byte is tested there; what all scripts promise, in test_runs.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import flexpredict
from flexpredict import Config, World

GOLDEN = Path(__file__).parent / "golden" / "flexpredict"
TINY = dict(image_size=32, patch=4, width=20, depth=2, heads=4, predictor_width=16, predictor_depth=2)


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def tensor(array, dtype=None):
    return torch.from_numpy(np.asarray(array)).to(dtype or torch.float64)


def close(actual, expected, atol=0.0, rtol=0.0):
    """Assert that two arrays are equal within tolerances."""
    torch.testing.assert_close(torch.as_tensor(actual).detach().double(), tensor(expected), atol=atol, rtol=rtol)


def tiny(mode="stop"):
    """(model, target) with the weights of the official-layout tiny checkpoint."""
    model, target = flexpredict.build(Config(**TINY, mode=mode))
    path = GOLDEN / "tiny_stop.pth.tar"
    flexpredict.load_weights(model, target, flexpredict.read_checkpoint(path, heads=4), path)
    return model, target


def inputs():
    """(golden forward file, patches, context masks, target masks)."""
    g = golden("forward")
    patches = tiny()[1].patch_embed.patchify(tensor(g["imgs"], torch.float32))
    return g, patches, *(tensor(g[f"masks_{k}"], torch.long) for k in ("enc", "pred"))


# ----------------------------------------------------------------------------------------------------------- parity


def test_encoders():
    g, patches, masks_context, _ = inputs()
    model, target = tiny()
    images = tensor(g["imgs"], torch.float32)
    close(target.pos_embed[0], g["pos_embed"], atol=1e-6)
    close(model.predictor.predictor_pos_embed[0], g["pred_pos_embed"], atol=1e-6)
    pooled, concat4, tokens = flexpredict.encode(target, images)
    close(tokens, g["target_tokens"], atol=1e-5)
    close(pooled, g["target_pooled"], atol=1e-5)
    close(concat4.unflatten(1, (2, 20)).transpose(0, 1), g["target_blocks_pooled"], atol=1e-5)
    raw = [target.embed(images)]
    raw += [block(raw[-1]) for block in target.blocks[:1]]
    raw = torch.stack([raw[1], target.blocks[1](raw[1])]).mean(2)
    close(raw, g["target_blocks_pooled_nonorm"], atol=1e-5)
    close(torch.stack(target(images, layers=(-2, -1))).mean(0), g["target_tokens_K2"], atol=1e-5)
    close(model.encoder(patches, keep=masks_context), g["enc_ctx"], atol=1e-5)
    close(model.encoder(patches, keep=tensor(g["masks_enc2"], torch.long)), g["enc_ctx2"], atol=1e-5)


def test_predictor_loss_and_gradients():
    g, patches, masks_context, masks_target = inputs()
    noise = tensor(g["noise"], torch.float32)
    model, target = tiny()
    predictions = model(patches, masks_context, masks_target, noise)
    close(predictions, g["pred_code"], atol=1e-5)
    targets = flexpredict.gather_targets(target(patches), masks_target)
    close(targets, g["targets"], atol=1e-5)
    loss = flexpredict.jepa_loss(predictions, targets)
    close(loss, g["loss"], atol=1e-6)
    loss.backward()
    embed, encoder, predictor = model.predictor.predictor_embed, model.encoder, model.predictor
    norms = dict(predictor_embed_w=embed.weight, predictor_embed_b=embed.bias, enc_norm_w=encoder.norm.weight,
                 patch_proj_w=encoder.patch_embed.proj.weight, enc_qkv0=encoder.blocks[0].attn.qkv.weight,
                 pred_proj_w=predictor.predictor_proj.weight,
                 pred_qkv0=predictor.predictor_blocks[0].attn.qkv.weight)  # fmt: skip
    for name, parameter in norms.items():
        close(parameter.grad.norm(), g[f"gn_{name}"], rtol=1e-4)
    close(embed.weight.grad, g["grad_predictor_embed_w"], atol=1e-6)
    assert predictor.mask_token.grad is None
    masks_context = tensor(g["masks_enc2"], torch.long)
    with torch.no_grad():
        two = model(patches, masks_context, masks_target, tensor(g["noise2"], torch.float32))
    close(two, g["pred_code_2enc"], atol=1e-5)
    assert flexpredict.gather_targets(target(patches), masks_target, 2).shape == two.shape


def test_the_paper_s_and_the_deterministic_variant():
    g, patches, masks_context, masks_target = inputs()
    noise = tensor(g["noise"], torch.float32)
    close(tiny("stop_paper")[0](patches, masks_context, masks_target, noise), g["pred_paper"], atol=1e-5)
    model, _ = tiny("ijepa")
    close(model(patches, masks_context, masks_target), g["pred_ijepa"], atol=1e-5)
    with torch.no_grad():
        model.predictor.mask_token.zero_()
    close(model(patches, masks_context, masks_target), g["pred_nostop"], atol=1e-5)
    for mode in ("stop", "stop_paper"):  # no noise asks about the mean position
        model, _ = tiny(mode)
        zero = model(patches, masks_context, masks_target, torch.zeros_like(noise))
        torch.testing.assert_close(model(patches, masks_context, masks_target), zero)


def test_covariance_is_that_of_the_released_code():
    g = golden("cov")
    weight = tiny()[0].predictor.predictor_embed.weight.detach()
    sigma = float(g["sigma"])
    close(sigma**2 * weight @ weight.T, g["cov_expected"], atol=1e-6)
    config = Config(**TINY, sigma=sigma, batch=2500, targets=4)
    noise = flexpredict.draw_noise(config, 0, 0, 2500, 20, "cpu").flatten(0, 2)  # 200,000 of them
    positions = flexpredict.stochastic_positions(torch.ones(16), noise, weight)
    found = torch.cov((positions - 1).T.double())
    for expected in (g["cov_expected"], g["cov_mc"]):
        assert (found - tensor(expected)).abs().max() < 0.03 * expected.max()
    assert (found - tensor(g["cov_paper_literal"])).abs().max() > g["cov_expected"].max()


def test_three_training_steps():
    """Noise, loss, schedules, AdamW and EMA together, against three steps of the reference."""
    g, trace = golden("forward"), golden("train_trace")
    model, target = tiny()
    patches = target.patch_embed.patchify(tensor(g["imgs"], torch.float32))
    masks_context, masks_target = (tensor(g[f"masks_{k}"], torch.long) for k in ("enc", "pred"))
    start, peak, final, wd, wd_final, ipe, epochs, warmup = trace["schedule"]
    config = Config(**TINY, lr=peak, lr_start=start, lr_final=final, weight_decay=wd, weight_decay_final=wd_final,
                    warmup=warmup / epochs)  # fmt: skip
    optimizer, ema = flexpredict.make_optimizer(model), common.OLD_EMA(target, model.encoder)
    for step in range(3):
        lr, decay, momentum = flexpredict.schedules(config, step, int(ipe * epochs))
        close([lr, decay, momentum], [trace[k][step] for k in ("lr", "wd", "m")], atol=1e-12)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0
        with torch.no_grad():
            targets = flexpredict.gather_targets(target(patches), masks_target)
        noise = tensor(trace["noise"][step], torch.float32)
        loss = flexpredict.jepa_loss(model(patches, masks_context, masks_target, noise), targets)
        close(loss, trace["losses"][step], rtol=1e-4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(momentum)
    for part, module, keys in (
        ("enc", model.encoder, "enc"),
        ("pred", model.predictor, "pred"),
        ("tgt", target, "enc"),
    ):
        state, sums = module.state_dict(), trace[f"{part}_sums"]
        assert set(trace[f"{keys}_keys"]) == set(state)
        found = torch.stack([torch.stack([state[k].sum(), state[k].abs().sum()]) for k in trace[f"{keys}_keys"]])
        assert (np.abs(found.double().numpy() - sums) <= 1e-4 * sums[:, 1:] + 1e-12).all()


@pytest.mark.parametrize("name", ["b16", "h16", "h16lin"])
def test_schedules_to_the_last_step(name):
    g, preset = golden("schedules"), f"vit_{name[:3]}_in1k"
    config = replace(Config(**flexpredict.PRESETS[preset]), freeze_to="final" if name == "h16lin" else "constant")
    steps = int(config.epochs * g["ipe"])
    found = [flexpredict.schedules(config, int(t) - 1, steps) for t in g[f"{name}_step"]]
    for values, key in zip(zip(*found), ("lr", "wd", "ema")):
        close(torch.tensor(values, dtype=torch.float64), g[f"{name}_{key}"], atol=1e-12)


def test_masks():
    """Block sizes exactly; the golden masks from their blocks; statistics of the batched sampler (ijepa.py's)."""
    g = golden("masks")
    config = Config(image_size=224, patch=16, masks="official", min_keep=10, batch=8)
    sizes = [sum(flexpredict.block_sizes(config, step), ()) for step in range(200)]
    np.testing.assert_array_equal(sizes, g["sizes_by_seed"])
    for call in range(3):
        expected = tensor(g[f"draw{call}_pred"], torch.long)
        (height, width), context_size = flexpredict.block_sizes(config, call)
        corners = torch.stack([expected[..., 0].T // 14, expected[..., 0].T % 14], dim=-1)
        blocks = flexpredict.rectangles(corners, (height, width), 14)
        assert torch.equal(flexpredict.to_indices(blocks, height * width), expected)
        # each context is its block without the targets, cut to its first patches: some place of the block explains it
        taken = blocks.any(1)
        places = torch.cartesian_prod(*(torch.arange(14 - side) for side in context_size))
        for image, context in enumerate(tensor(g[f"draw{call}_enc"], torch.long)[0]):
            options = flexpredict.rectangles(places, context_size, 14) & ~taken[image]
            cut = [option.nonzero()[: len(context), 0] for option in options]
            assert any(torch.equal(indices, context) for indices in cut)
    lengths, asked, unions, cover, covered = [], [], [], torch.zeros(196), torch.zeros(196)
    for step, seed in ((step, seed) for step in range(400) for seed in range(4)):
        ((masks_context, masks_target),) = flexpredict.sample_masks(replace(config, seed=seed), step)
        lengths.append(masks_context.shape[-1])
        asked.append(masks_target.shape[-1])
        cover += torch.bincount(masks_context.flatten(), minlength=196)
        union = torch.zeros(8, 196).scatter_(1, masks_target.transpose(0, 1).flatten(1), 1.0)
        unions.append(union.sum(1).mean())
        covered += union.sum(0)
    np.testing.assert_array_equal(asked[::4], g["stat_pred_kept_per_iter"])
    for values, key in ((lengths, "ctx"), (asked, "pred"), (unions, "union")):
        assert np.mean(values) == pytest.approx(float(g[f"stat_{key}_mean"]), rel=0.02)
    for found, key in ((cover, "ctx_freq"), (covered, "pred_union_freq")):
        assert (found.view(14, 14) / 4 / 3200 - tensor(g[f"stat_{key}"], torch.float32)).abs().max() < 0.03
    histogram = tensor(g["stat_union_pred"])
    assert (histogram * torch.arange(197)).sum() / histogram.sum() == pytest.approx(float(g["stat_union_mean"]))


def test_low_shot():
    g = golden("lowshot")
    x, y, xv, yv = tensor(g["Xt"]), tensor(g["yt"]), tensor(g["Xv"]), tensor(g["yv"])
    train, val = flexpredict.standardise_columns(x), flexpredict.standardise_columns(xv)
    weight = flexpredict.logistic_regression(train, y.long(), 4, float(g["lambd"]))
    objective = F.cross_entropy(train @ weight.T, y.long()) + float(g["lambd"]) / 120 * weight.square().sum()
    close(objective, g["objective"], atol=1e-4)
    close(weight, g["W"], atol=1e-3)
    close(train @ weight.T, g["train_logits"], atol=1e-2)
    close(val @ weight.T, g["val_logits"], atol=1e-2)
    features = [flexpredict.Features(a, a, None, b.long(), []) for a, b in ((x, y), (xv, yv))]
    assert flexpredict.low_shot(*features, 4, float(g["lambd"])) == pytest.approx(100 * float(g["val_acc"]))
    assert flexpredict.low_shot(features[0], features[0], 4, float(g["lambd"])) == pytest.approx(100 * g["train_acc"])
    assert flexpredict.standardise_columns(torch.ones(5, 2)).eq(0).all()


def test_label_propagation():
    g = golden("labelprop")
    h, w = int(g["h"]), int(g["w"])
    features = tensor(g["feats"], torch.float32).unflatten(1, (h, w))
    first = F.one_hot(tensor(g["first_labels"], torch.long)).permute(2, 0, 1)
    np.testing.assert_array_equal(first, g["first_onehot"])
    soft = flexpredict.propagate_labels(features, first, int(g["n_last"]), int(g["radius"]), int(g["topk"]))
    close(soft, g["seg"], atol=1e-5)
    patch = int(g["patch"])
    labels = flexpredict.label_maps(soft, patch, (h * patch, w * patch))
    np.testing.assert_array_equal(labels, g["argmax_up"])


def test_region_and_contour():
    g = golden("jf")
    true, predicted = torch.from_numpy(g["gt"]), torch.from_numpy(g["pred"])
    np.testing.assert_array_equal(flexpredict.boundary(true[0] == 1), g["bmap0"])
    means = []
    for i in (1, 2):
        values = flexpredict.region_and_contour(predicted == i, true == i)
        close(values[:, 0], g["J"][i - 1], atol=1e-9)
        close(values[:, 1], g["F"][i - 1], atol=1e-9)
        for column, key in ((0, "J_stats"), (1, "F_stats")):
            statistics = flexpredict.sequence_statistics(values[1:-1, column])
            close(statistics, g[key][i - 1], atol=1e-9)
            means.append(statistics[0])
    close(torch.stack(means).mean(), g["JF_mean"], atol=1e-9)
    empty, full = torch.zeros(1, 9, 9, dtype=torch.bool), torch.eye(9, dtype=torch.bool)[None]
    assert flexpredict.region_and_contour(empty, empty).eq(1).all()
    assert flexpredict.region_and_contour(empty, full).eq(0).all()


# ------------------------------------------------------------------------------------------------------ the method


def test_the_noise_is_tied_to_the_context():
    """The gradient of W is that of its two uses, context and noise; with a free matrix only the latter could be 0."""
    g, patches, masks_context, masks_target = inputs()
    noise = tensor(g["noise"], torch.float32)
    model, target = tiny()
    targets = flexpredict.gather_targets(target(patches), masks_target).detach()

    def gradient(cut):
        """W's gradient with one of its two uses detached."""
        model.zero_grad()
        queries, embed = model.predictor.queries, model.predictor.predictor_embed
        weight, bias = embed.weight.detach(), embed.bias.detach()
        if cut == "noise":
            model.predictor.queries = lambda p, n: flexpredict.stochastic_positions(p, n, weight, bias)
        if cut == "context":
            handle = embed.register_forward_hook(lambda module, inputs, out: F.linear(inputs[0], weight, bias))
        flexpredict.jepa_loss(model(patches, masks_context, masks_target, noise), targets).backward()
        model.predictor.queries = queries
        if cut == "context":
            handle.remove()
        return [embed.weight.grad.clone(), embed.bias.grad.clone()]

    for whole, context, tied in zip(gradient(None), gradient("noise"), gradient("context")):
        torch.testing.assert_close(whole, context + tied, atol=1e-7, rtol=1e-5)
        assert tied.norm() > 0.05 * whole.norm()


def test_noise_does_not_depend_on_who_draws_it():
    config = Config(batch=64, contexts=2, seed=3, sigma=0.5)
    whole = flexpredict.draw_noise(config, 7, 0, 64, 9, "cpu").unflatten(1, (2, 64))  # [M, E, B, Kp, D]
    assert whole.shape == (4, 2, 64, 9, 64) and abs(whole.std().item() - 0.5) < 0.005
    for first, last in ((0, 32), (32, 64), (20, 23), (15, 17)):
        part = flexpredict.draw_noise(config, 7, first, last, 9, "cpu")
        assert torch.equal(part.unflatten(1, (2, last - first)), whole[:, :, first:last])
    assert not torch.equal(flexpredict.draw_noise(config, 8, 0, 64, 9, "cpu").unflatten(1, (2, 64)), whole)
    flat = whole[:, :, :16].flatten()
    assert len(flat.unique()) > 0.99 * len(flat), "samples share noise"


def test_grey_and_blurred_views():
    config = Config(batch=40, grey=0.4, blur=0.6, blur_sigma=(1.0, 2.0))
    pixels = torch.randint(0, 256, (40, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    images = flexpredict.normalize(pixels)
    views = flexpredict.grey_and_blur(images, config, 5, 0)
    torch.testing.assert_close(flexpredict.grey_and_blur(images[10:20], config, 5, 10), views[10:20])
    found = flexpredict.to_pixels(views).round()
    grey, same = (found.std(1).amax((1, 2)) == 0), (found - pixels).abs().amax((1, 2, 3)) == 0
    smooth = found.diff(dim=3).abs().mean((1, 2, 3)) < 0.5 * pixels.float().diff(dim=3).abs().mean((1, 2, 3))
    assert 8 <= grey.sum() <= 24 and 14 <= smooth.sum() <= 32 and 4 <= same.sum() <= 18
    assert (same | grey | smooth).all()
    torch.testing.assert_close(flexpredict.grey_and_blur(images, replace(config, grey=0.0, blur=0.0), 5, 0), images)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_toy_scenes_are_what_their_labels_say():
    pixels, labels, objects, kinds = flexpredict.toy_scenes(60, 32)
    assert pixels.shape == (60, 1, 3, 32, 32) and labels.shape == (60, 1, 32, 32)
    for scene, count, image in zip(labels[:, 0], objects, pixels[:, 0, 0].float()):
        assert len(scene.unique()) == count + 1, "in a still scene no object hides another"
        for i in range(1, count + 1):
            lighter = image[scene == i].mean() - image[scene == 0].mean()
            assert 20 < lighter * (1 if i % 2 else -1) < 60
    assert set(objects.tolist()) == {0, 1, 2, 3, 4} and set(kinds[:, 1:].flatten().tolist()) == {1, 2, 3}
    again = flexpredict.toy_scenes(60, 32)
    assert torch.equal(pixels, again[0]) and not torch.equal(pixels, flexpredict.toy_scenes(60, 32, seed=1)[0])
    _, labels, _, _ = flexpredict.toy_scenes(5, 48, frames=8, objects=2)
    assert (labels[:, 1:] != labels[:, :-1]).flatten(2).any(2).all(), "everything moves"


def test_scenes_to_train_on_are_quarters_with_the_shape_that_their_class_says():
    split = flexpredict.open_data(Config(data="scenes"), "val")
    pixels, labels, _, kinds = flexpredict.toy_scenes(250, 48, noise=60.0, seed=6)
    assert len(split) == 1000 and split.classes == ["none", "disc", "square", "triangle"]
    assert split.labels.bincount(minlength=4).min() > 50
    for quarter, (row, column) in enumerate(((0, 0), (0, 24), (24, 0), (24, 24))):
        for scene in (0, 100, 249):
            i, rows, columns = quarter * 250 + scene, slice(row, row + 24), slice(column, column + 24)
            assert torch.equal(split.pixels[i], pixels[scene, 0, :, rows, columns])
            shown = labels[scene, 0, rows, columns].unique()
            assert len(shown) <= 2 and split.labels[i] == kinds[scene, shown[-1].long()]


def test_video_evaluation_of_a_perfect_and_of_a_blind_encoder():
    """An encoder that sees the labels scores high; one that sees nothing cannot follow."""
    config = Config(image_size=24, patch=4)
    frames, labels = next(iter(flexpredict.toy_videos(config, count=1)))

    class Oracle(torch.nn.Module):
        """Tokens: which object covers how much of the patch."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            part = labels[self.calls : self.calls + len(x)].long()
            self.calls += len(x)
            shares = F.one_hot(part, 3).permute(0, 3, 1, 2).float()
            return F.avg_pool2d(shares, 4).flatten(2).mT

    found, seen = flexpredict.segment_video(Oracle(), frames, labels, config)
    assert found.shape == labels[1:].shape and seen.shape == (2, 2, 3)
    _, blind = flexpredict.segment_video(lambda x: torch.ones(len(x), 144, 2), frames, labels, config)
    assert seen[:, 0, 0].mean() > 0.6 > blind[:, 0, 0].mean() + 0.2


def test_davis_folder(tmp_path, capsys):
    from PIL import Image

    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for i in range(6):
            path = tmp_path / kind / "480p" / "ball" / f"{i:05d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = np.zeros((96, 128), np.uint8)
            picture[30:70, 20 + 8 * i : 60 + 8 * i] = 1
            if suffix == "png":
                image = Image.fromarray(picture, mode="P")
                image.putpalette([0, 0, 0, 128, 0, 0])
            else:
                image = Image.fromarray(np.repeat(picture[..., None] * 200, 3, 2))
            image.save(path)
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("ball\n")
    config = Config(image_size=64, patch=32, davis=str(tmp_path), eval="video")
    frames, labels = flexpredict.davis_video(tmp_path, "ball", 32)
    assert frames.shape == (6, 3, 480, 640) and labels.shape == (6, 96, 128) and labels.unique().tolist() == [0, 1]
    encoder = flexpredict.build(replace(config, width=16, depth=1, heads=2))[1]
    result = flexpredict.evaluate_video(encoder, config, World(0, 1, torch.device("cpu")))
    assert 30 < result["J&F"] <= 100 and result["J&F"] == pytest.approx((result["J"] + result["F"]) / 2)
    (tmp_path / "Annotations/480p/ball/00003.png").unlink()
    with pytest.raises(SystemExit):
        flexpredict.davis_video(tmp_path, "ball", 32)
    assert "00003.png" in capsys.readouterr().err


def test_all_evaluations_run(tmp_path):
    """Counting and videos without any labels, beside a run on a flat folder; all others on toy images."""
    small = "--width 16 --depth 2 --heads 2 --predictor-width 16 --predictor-depth 2 --batch 16 --device cpu".split()
    small += "--no-compile --steps 2 --probe-epochs 1 --out run --eval-limit 200".split()
    flexpredict.main([*small, "--eval", "knn,linear,lowshot,video,count,features", "--grey", "0.3", "--blur", "0.3"])
    import json

    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    results = rows[-1]["eval"]
    for network in ("trained", "random"):
        assert {"knn20", "linear", "lowshot", "J&F", "J", "F recall", "J decay", "count"} <= results[network].keys()
    assert rows[0]["position_noise"] > 0 and Path("run/picture.png").stat().st_size > 1000


def test_official_checkpoint_loads_and_trains_on():
    tiny_stop = GOLDEN / "tiny_stop.pth.tar"
    vit = flexpredict.load_encoder(tiny_stop, heads=4)
    g = golden("forward")
    close(vit(tensor(g["imgs"], torch.float32)), g["target_tokens"], atol=1e-5)
    flags = "--heads 4 --data toy --image-size 24 --steps 1 --eval none --lr 0 --lr-start 0 --lr-final 0 --device cpu"
    flexpredict.main(["--init", str(tiny_stop), *flags.split(), "--no-compile", "--out", "tuned"])
    state = torch.load("tuned/last.pt", weights_only=True)
    theirs = flexpredict.read_checkpoint(tiny_stop, heads=4)
    assert torch.equal(state["model"]["predictor.mask_token"], theirs["predictor"]["mask_token"])
    assert flexpredict.read_checkpoint("tuned/last.pt")["architecture"]["mode"] == "stop"
