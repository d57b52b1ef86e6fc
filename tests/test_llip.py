"""llip.py against the reference's numbers (tests/golden/llip) and its own promises."""

import functools
import gzip
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import GOLDEN, close, compare, free_port, golden_tensors, groups_of, log_rows, norms
from helpers import on_ranks, run_several
from PIL import Image, ImageColor
from test_runs import SCRIPTS, assert_same, here, learn, photographs, refused

import common
import llip
from llip import Config

SCRIPT = SCRIPTS["llip"]
FLAGS = {
    "llip_tiny": {"heads": 4, "text_heads": 2, "mix_heads": 4, "tau": 5.0},
    "llip_tiny_norm_legacy": {"heads": 2, "text_heads": 3, "mix_heads": 2, "tau": 5.0},
}
golden = functools.partial(golden_tensors, "llip")
compare_values = functools.partial(compare, atol=1e-5, rtol=1e-4)
compare_gradients = functools.partial(compare, atol=1e-6, rtol=1e-4)


def load(path, **known):
    """Return (model, config) of a checkpoint; known: what the file cannot tell."""
    state = llip.read_weights(path, known)
    config = Config(**{**state["fields"], **known})
    model = llip.build(config, len(state["model"]["token_embedding.weight"]))
    llip.load_weights(model, state, path)
    return model, config


def tiny(name="llip_tiny"):
    """Return (model, config) of a golden checkpoint."""
    return load(GOLDEN / "llip" / f"{name}.pt", **FLAGS[name])


def ours(names):
    """Return our parameters' names of those in a golden file."""
    return [name.removeprefix("pred.") for name in names]


# ----------------------------------------------------------------------------------------- parity

HEAD = ("out_proj", "logit_scale", "logit_bias")


@pytest.mark.parametrize("name", FLAGS)
def test_towers_head_loss_and_gradients(name, monkeypatch):
    """In tiles of 3 x 3 pairs, the last ones smaller; once with recomputed activations."""
    monkeypatch.setattr(llip, "pairs_in_tile", lambda *_: 9)
    g = golden("llip_forward" + "_norm" * ("norm" in name))
    model, config = tiny(name)
    visual = model.visual
    visual.transformer.recompute = model.transformer.recompute = config.mix_norm
    x = visual.embed(g.images)
    block = visual.transformer.resblocks[0](x)
    compare_values(g, "vis_", ln_pre=x, block0=block, tokens=visual(g.images))
    image = model.image(g.images)
    text = model.text(g.tokens)
    hidden = model.encode_tokens(g.tokens)
    k, v = image.unbind(1)
    q = text[:, 0].unflatten(1, (k.shape[1], -1))
    compare_values(g, text_hidden=hidden, K=k, V=v, Q=q, zt=text[:, 1])
    mix = llip.mixing_weights(k, q, 5).permute(1, 3, 0, 2)  # [B, T, H, K]
    z = torch.einsum("bthk,bhkd->bthd", mix, v).flatten(2) @ model.out_proj
    compare_values(g, attn_tau5=mix, z_tau5=z)
    for tau in (1, 8, 5):
        model.tau = tau
        scores = llip.score(model, text, (g.images - llip.SHIFT) / llip.SCALE)
        compare_values(g, **{f"cos_tau{tau}": scores})
    n = len(g.logits_tau5)
    logits = model.logit_scale.exp() * scores[:n, :n] + model.logit_bias
    with torch.autocast("cpu", torch.bfloat16):  # the pair loss is exact all the same
        loss = llip.contrastive_loss(image[:n], text[:n], model)
    compare_values(g, f64_cos=scores, logits_tau5=logits, loss_tau5=loss, f64_loss=loss)
    loss.backward()
    names = ours(g.grad_names)
    gradients = {name: model.get_parameter(name).grad.squeeze() for name in (*HEAD, "q_proj")}
    gradients["class_embedding"] = visual.class_embedding.grad
    compare_gradients(g, "grad_", norms=norms(model, names, gradients=True), **gradients)
    optimizer = llip.make_optimizer(model, config)
    assert [group["decay"] for group in optimizer.param_groups] == [True, False, False]
    decayed, *others = groups_of(optimizer, model)
    left = set.union(*others)
    assert left == set(g.no_decay_names) and decayed == set(names) - left


@pytest.mark.parametrize("name", ["clip_gelu", "siglip"])
def test_baselines(name):
    g = golden("baselines")
    state = {key[9:]: value for key, value in g.items() if key.startswith("sd/ncls1/")}
    if name == "clip_gelu":
        del state["logit_bias"]
        state.update(input_resolution=torch.tensor(12), vocab_size=torch.tensor(33))
    torch.save(state, "weights.pt")
    model, _ = load("weights.pt", heads=2, text_heads=2, quick_gelu=name == "siglip")
    loss = model(g.images, g.tokens)
    compare_values(g, f"{name}_", image=model.image(g.images), loss=loss)
    compare_values(g, f"{name}_", text=model.text(g.tokens)[:, 0])
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    compare_gradients(g, f"{name}_grad", _scale=model.logit_scale.grad[0], norm_total=norm)


def test_schedule():
    g = golden("schedule")
    for i in "01":
        lr, warmup, total = g[f"cfg{i}"].tolist()
        config = Config(lr=lr, warmup=(warmup + 0.5) / total)
        found = [llip.schedules(config, step, int(total)) for step in g[f"steps{i}"].tolist()]
        close(found, g[f"lr{i}"], rtol=1e-9)


def test_training_steps():
    """Six steps of the reference loop: schedule, AdamW, decay, and the clamp of the scale."""
    g = golden("train_trace")
    data = golden("llip_forward")
    lr, warmup, total = g.lr_cfg.tolist()
    model, config = tiny()
    config = replace(config, lr=lr, warmup=(warmup + 0.5) / total)
    model.logit_scale.data.fill_(g.start_logit_scale)
    optimizer = llip.make_optimizer(model, config)
    for step in range(6):
        rate = llip.schedules(config, step, int(total))
        common.set_rates(optimizer, rate, 0.2)
        loss = model(data.images, data.tokens[:4])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(0, math.log(100))
        found = {"scale": model.logit_scale[0], "bias": model.logit_bias[0]}
        compare(g, at=step, rtol=1e-3, lrs=rate, losses=loss, **found)
    final = {"out_proj": model.out_proj, "class_embedding": model.visual.class_embedding}
    compare(g, "final_", rtol=1e-3, atol=1e-3, **final)
    difference = norms(model, ours(g.param_names)) - g.final_norms
    loose = [2e-2 if "in_proj_bias" in name else 1e-3 for name in g.param_names]
    assert (difference.abs() <= torch.tensor(loose) * g.final_norms).all()


def one_of_three(rank, port):
    """Compare the loss of a rank's images against all captions, and the gradients."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, rank=rank, world_size=3)
    g = golden("distributed_loss")
    llip.pairs_in_tile = lambda *_: 9
    leaves = {name: g[name][rank].requires_grad_() for name in ("K", "V", "Q", "zt")}
    model = llip.build(Config(mix_heads=2, tau=g.tau.item()), 40)
    head = {name: model.get_parameter(name) for name in HEAD}
    for name, parameter in head.items():
        parameter.data = torch.atleast_1d(g[name].float())
    k, v, q, z = leaves.values()
    text = torch.stack([q.flatten(1), z], 1)
    loss = llip.contrastive_loss(torch.stack([k, v], 1), text, model)
    loss.backward()
    compare_gradients(g, at=rank, loss_per_rank=loss)
    compare_gradients(g, "grad_", at=rank, **{name: x.grad for name, x in leaves.items()})
    means = {f"{name}_mean": common.mean_over_ranks(p.grad).squeeze() for name, p in head.items()}
    compare_gradients(g, "grad_", **means)


def test_three_ranks_give_the_reference_loss():
    on_ranks(one_of_three, free_port(), ranks=3)


def test_four_ranks_are_one_process():
    photographs(Path("photos"), count=24)
    flags = f"{SCRIPT.folder} {SCRIPT.slow} --data photos --steps 3 --eval none"
    run_several(f"llip {flags} --out four", ranks=4)
    here(SCRIPT, flags, "--out one")
    assert_same("one", "four", tolerance=1e-5, without=SCRIPT.noise)
    for a, b in zip(log_rows("one"), log_rows("four"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-5)


@torch.no_grad()
def test_zeroshot():
    g = golden("zeroshot")
    model, _ = tiny()
    true = F.one_hot(g.targets, 6).bool()
    text = torch.stack([llip.mean_of_prompts(model.text(tokens)) for tokens in g.prompt_tokens])
    q = text[:, 0].unflatten(1, (4, 4))
    compare_values(g, text_features=text[:, 1], Q=q)
    for tau, accuracy in zip(g.temps, g.acc, strict=True):
        model.tau = tau
        scores = llip.score(model, text, (g.images - llip.SHIFT) / llip.SCALE)
        compare_values(g, **{f"logits_tau{tau}": scores})
        assert llip.recall(scores, true, "top", (1,)) == pytest.approx({"top1": float(accuracy)})
    found = llip.recall(g.logits_tau5, true, "top", (1, 3))
    compare_values(g, top1_top5half_tau5=[*found.values()])


def test_retrieval():
    g = golden("retrieval")
    found = llip.retrieval(g.img @ g.txt.T, torch.eye(12) > 0)
    own = g.multi_owner == torch.arange(12)[:, None]
    multi = llip.retrieval(g.multi_scores, own)
    for way, theirs in {"i2t": "image_to_text", "t2i": "text_to_image"}.items():
        for k in (1, 5, 10):
            expected = g["values"][g.names.index(f"{theirs}_R@{k}")]
            close(found[f"{way} R@{k}"], 100 * expected, rtol=1e-6)
            close(multi[f"{way} R@{k}"], 100 * g[f"multi_{way}_R{k}"], rtol=1e-6)
    scores = g.multi_scores[own].view(12, 5)  # each image has five captions
    close(multi["spread"], 100 * scores.std(1, correction=0).mean(), rtol=1e-5)


# -------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_the_reference_tokenizer():
    g = golden("tokenizer")
    assert llip.BYTES == g.byte_order.tolist()
    assert [ord(llip.CHARACTERS[b]) for b in range(256)] == g.byte_chars.tolist()
    tokenizer = llip.Tokenizer(llip.read_merges(str(GOLDEN / "llip" / "bpe_tiny.txt.gz")), 6)
    assert tokenizer.start + 2 == g.tiny_vocab_size
    names = [*tokenizer.ids, llip.START, llip.END]
    values = {" ": 32, **{character: b for b, character in llip.CHARACTERS.items()}}
    for i, text in enumerate(g.strings):
        assert llip.clean(text) == g.cleaned[i]
        assert "\x1f".join(llip.PIECES.findall(llip.clean(text))) == g.pieces[i]
        ids = tokenizer.encode(text)
        assert ids == g.tiny_ids[i, : g.tiny_len[i]].tolist()
        written = "".join(names[j] for j in ids).replace("</w>", " ")
        assert bytes(map(values.get, written)).decode(errors="replace") == g.tiny_decoded[i]
    caption = "the cat on the mat in the hat"
    empty, cut = tokenizer(["", caption]).tolist()
    assert empty == [567, 568, 0, 0, 0, 0]
    assert cut == [567, *tokenizer.encode(caption)[:4], 568]


VOCABULARY = Path(os.environ.get("DATA", "data")).absolute() / "bpe_simple_vocab_16e6.txt.gz"


@pytest.mark.skipif(not VOCABULARY.is_file(), reason="needs OpenAI's vocabulary file in $DATA")
def test_tokenizer_with_the_real_vocabulary():
    g = golden("tokenizer")
    for context in (77, 16):
        tokenizer = llip.Tokenizer(llip.read_merges(str(VOCABULARY)), context)
        close(tokenizer(g.strings), g[f"ids_{context}"])


def test_learned_merges_depend_on_no_order():
    captions = ["low lower lowest", "new newer newest", "wide wider widest"] * 5
    merges = llip.learn_merges(captions, 20)
    assert merges == llip.learn_merges(captions[::-1], 20) and "w e" in merges


# ------------------------------------------------------------------------------------------- data


def open_pairs(part="train", **fields):
    return llip.open_pairs(Config(**fields), part, common.World())


def crops(size, seed, count):
    """Draw training crops of images of a size."""
    random = torch.Generator().manual_seed(seed)
    return [common.random_crop(*size, (0.9, 1.0), random) for _ in range(count)]


def test_transforms_are_the_reference_transforms():
    """Training crops are compared off the border, where ours mix in what lies beyond the crop."""
    g = golden("transforms")
    size = g.image_size.item()
    images = [Image.fromarray(g[f"im{i}"].numpy()) for i in range(4)]
    val = llip.unlabelled(images, range(4), [], "val")
    train = replace(val, centred=False)
    _, pixels, _ = common.centre_crops(val, size, range(4))
    for i, image in enumerate(images):
        close(pixels[i], 255 * (g[f"val{i}"] * llip.STD + llip.MEAN), atol=1.5)
        [box] = crops(image.size, 3 + i, 1)
        compare(g, **{f"train_box_{i}": box})
        [part] = train.read(i, lambda *_, box=box: [box], [size], Image.BICUBIC)
        inner = (slice(None), slice(3, -3), slice(3, -3))
        close(part[inner], g[f"train_uint8_{i}"][inner], atol=1)
    draws = {"rrc": ((31, 22), 3), "rrc40x36": ((40, 36), 53)}
    for name, case in draws.items():
        compare(g, **{f"{name}_first16": crops(*case, 16)})


def make_shards():
    """Make two tar shards of ten pairs, with members that belong to no pair."""
    for shard in "01":
        photographs(Path(shard), count=10, splits=".", classes=".")
        for i in range(10):
            Path(shard, f"{i}.txt").write_text(f"{i} of {shard}")
            Path(shard, f"{i}.json").write_text("{}")
            Path(shard, f"._{i}.jpg").write_text("macOS")
        Path(shard, "9.jpg").rename(Path(shard, "9.JPG"))
        shutil.make_archive(f"shards/{shard}", "tar", shard)


def test_shards_train_and_evaluate():
    """The number of loading processes changes nothing."""
    make_shards()
    split = open_pairs(data="shards")
    assert len(split) == 20 and split.captions[13] == ["3 of 1"]
    assert split.images[13].read() == Path("1/3.jpg").read_bytes()
    assert "1.tar, byte" in repr(split.images[13])
    flags = f"{SCRIPT.small} --data shards --steps 2"
    here(SCRIPT, flags, "--val-data shards --eval retrieval --out one")
    here(SCRIPT, flags, "--workers 2 --out two")
    assert_same("one", "two")
    assert Image.open("one/picture.png").size == (400, 200)


def test_bad_shards_are_named_and_limited(capsys):
    """Unusual names, a missing caption, a cut and a compressed shard."""
    make_shards()
    for name in ("b.input.jpg", "b.outputs.txt", "c.jpg"):
        Path("1", name).write_text("something")
    shutil.make_archive("shards/1", "tar", "1")
    here(SCRIPT, "--data shards", code=2)
    printed = capsys.readouterr()
    assert "expected b.jpg and b.txt, found b['.input.jpg', '.outputs.txt']" in printed.out
    assert "1.tar: expected c.jpg and c.txt" in printed.out and "more than 1 %" in printed.err
    whole = Path("shards/0.tar").read_bytes()
    Path("cut.tar").write_bytes(whole[: len(whole) // 2 + 300])
    samples, wrong = llip.tar_samples("cut.tar")
    assert 2 < len(samples) < 8 and "cut.tar: " in wrong[0]
    Path("z.tar.gz").write_bytes(gzip.compress(whole))
    assert "compressed" in refused(capsys, SCRIPT, "--data z.tar.gz")


CAPTIONS = {
    "captions_train.json": r"""{
        "images": [{"id": 7, "file_name": "0.jpg"}, {"id": 8, "file_name": "1.jpg"}],
        "annotations": [
            {"image_id": 7, "caption": "one, \"two\""},
            {"image_id": 7, "caption": "three\nlines\u0085here"},
            {"image_id": 8, "caption": "four"}]}""",
    "captions_val.json": r"""{
        "images": [{"id": 1, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 1, "caption": "five"}]}""",
    "dataset.json": r"""{"images": [
        {"filename": "0.jpg", "split": "train", "sentences": [
            {"raw": "one, \"two\""}, {"raw": "three\nlines\u0085here"}]},
        {"filename": "1.jpg", "split": "restval", "sentences": [{"raw": "four"}]},
        {"filename": "2.jpg", "split": "test", "sentences": [{"raw": "five"}]}]}""",
    # with the mark that Excel puts before it
    "x.csv": '''\ufeffn,caption,file
1,"one, ""two""",0.jpg
1,"three\nlines\x85here",0.jpg
1,four,1.jpg''',
    "y.tsv": '''n\tcaption\tfile
1\t"one, ""two"""\t0.jpg
1\t"three\nlines\x85here"\t0.jpg
1\tfour\t1.jpg''',
}


def test_captions_files(capsys):
    """Every layout gives the same images with the same captions, in the same order."""
    photographs(Path(), count=3, splits=".", classes=".")
    for name, content in CAPTIONS.items():
        Path(name).write_text(content, encoding="utf-8")
    for data in ("captions_train.json", "dataset.json", "x.csv", "y.tsv"):
        split = open_pairs(data=data, columns="file,caption", images=".")
        assert split.names == ["0.jpg", "1.jpg"], data
        assert split.captions == [['one, "two"', "three\nlines\x85here"], ["four"]], data
        val = open_pairs("val", data=data)
        assert (val and val.captions) == ([["five"]] if data.endswith("json") else None)
    rows = ["filepath,title", "0.jpg,a dog", "1.jpg,", ",a cat", "2.jpg", "0.jpg," + "0 " * 99]
    Path("x.csv").write_text("\n".join(rows))
    here(SCRIPT, SCRIPT.small, "--data x.csv --steps 1")
    printed = capsys.readouterr().out
    assert "x.csv: 3 train pairs are left out" in printed
    assert "1 of 2 captions read are cut" in printed
    for name, content, said in (
        ("list.json", "[]", "no captions file"),
        ("lost.csv", "filepath,title\nlost.jpg,a dog\n", "--images"),
        ("other.csv", "file_name,text\n0.jpg,a dog\n", "KeyError('filepath')"),
    ):
        Path(name).write_text(content)
        assert said in refused(capsys, SCRIPT, f"--data {name}")
    assert "train/CLASS" in refused(capsys, SCRIPT, "--data .")


def test_classes_have_prompts_and_names():
    """Prompts have the published numbers; names and synonyms can be given."""
    [captions] = llip.class_captions(["cat"], Config(data="cifar10"))
    assert len(set(captions)) == 18
    photographs(Path("imagenet"), classes=("n01", "x_ray"))
    captions = open_pairs(data="imagenet").captions[-1]
    assert len(set(captions)) == 80 and "a photo of a hard to see x ray." in captions
    Path("names.json").write_text('["cat", ["dog", "puppy"]]')
    captions = open_pairs("val", data="imagenet", class_names="names.json").captions[-1]
    assert len(captions) == 160 and "art of the puppy." in captions


# ---------------------------------------------------------------------------------------- weights


def test_released_weights_in_features_out(capsys):
    """A released layout through --init, at another resolution: fine-tuned, then its features."""
    path = GOLDEN / "llip" / "llip_tiny.pt"
    heads = "--heads 4 --text-heads 2 --mix-heads 4 --tau 5"
    vocabulary = f"--vocabulary {GOLDEN}/llip/bpe_tiny.txt.gz"
    lacking = {"": "--heads", heads: "--vocabulary", f"{heads} {vocabulary}": "token_embedding"}
    for flags, said in lacking.items():
        assert said in refused(capsys, SCRIPT, f"--no-train --init {path}", flags)
    state = common.load_checkpoint(path)["state_dict"]
    state["token_embedding.weight"] = torch.randn(516, 12)
    torch.save({"epoch": 3, "state_dict": state}, "released.pt")
    Path("v.txt.gz").write_bytes(gzip.compress(b"#version\na b\nt h"))
    photographs(Path("photos"), count=6, size=(48, 48))
    flags = f"{heads} --vocabulary v.txt.gz --workers 0 --data photos"
    flags += " --image-size 48 --device cpu --no-compile --precision fp32"
    here(SCRIPT, flags, "--init released.pt --steps 1 --batch 4 --lr 0 --eval zeroshot --out tuned")
    here(SCRIPT, flags, "--init tuned/last.pt --no-train --eval features --out one")
    found = np.load("one/features.npz")
    val = common.open_split("photos", "val")
    assert found["paths"].tolist() == val.names
    images = common.normalize(common.centre_crops(val, 48, range(6))[1])
    model, _ = load("released.pt", **FLAGS["llip_tiny"], image_size=48)
    values = model.image(llip.clip_range(images))[:, 1].mean(2).flatten(1)
    close(found["features"], F.normalize(values @ model.out_proj, dim=1), atol=1e-5)


def test_presets_are_the_papers():
    """Mixture tokens, width and embedding of each model."""
    shapes = {
        "vit_b32": (64, 768, 512),
        "vit_b16": (32, 768, 512),
        "vit_l14": (32, 1024, 768),
        "vit_l14_k64": (64, 1024, 768),
        "vit_h14": (64, 1280, 1024),
        "vit_g14": (64, 1664, 1280),
    }
    for name, shape in shapes.items():
        config = Config(**llip.PRESETS[name])
        with torch.device("meta"):
            assert llip.build(config, 49408).k_proj.shape == shape
        assert llip.schedules(config, 1999, config.steps) == pytest.approx(config.lr)
    assert Config(**llip.PRESETS["vit_l14"]).context == 64


# --------------------------------------------------------------------------------------- learning


def test_toy_captions_are_true():
    """A place names the colour that is painted in its quarter."""
    split, facts = llip.toy_world("val")
    for image, scene in zip(split.images, facts, strict=True):
        assert scene["count"] == [f"{len(scene['place'])} shapes"]
        for fact in scene["place"]:
            row, column, colour, _ = fact.split()
            quarters = np.array(image).reshape(2, 16, 2, 16, 3).astype(int)
            quarter = quarters[int(row == "bottom"), :, int(column == "right")]
            painted = np.ptp(quarter, axis=(0, 1)) > 60
            assert painted.tolist() == [c > 0 for c in ImageColor.getrgb(colour)]


def test_llip_learns(monkeypatch):
    """On 32 toy scenes: captions are found again, and by their own mix of tokens."""
    pairs, facts = llip.toy_world("val")
    few = replace(pairs, names=range(32), labels=pairs.labels[:32])
    monkeypatch.setattr(llip, "toy_world", lambda part: (few, facts[:32]))
    flags = "--steps 200 --batch 32 --mixture-tokens 4 --width 32 --depth 2 --text-depth 1"
    rows = learn(SCRIPT, f"--preset toy {flags} --workers 0 --eval kinds,retrieval")
    found = rows[-1]["eval"]
    assert found["trained"]["i2t R@1"] > 80 and found["trained"]["scene"] > 80, found
    assert found["mean token"]["i2t R@1"] < 60 and found["random"]["i2t R@1"] < 20, found
