"""Raw images give the same pixels as in transformers, replace the marks in prompts, and are read only when needed."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from llmquest_rl.data.dataset import DatasetContext
from llmquest_rl.data.datasets import sft
from llmquest_rl.data.files import read_hub
from llmquest_rl.data.images import ImageReader, check_images, image_reader
from llmquest_rl.data.open_dataset import open_dataset
from llmquest_rl.data.rows import DataError, ListedRows, MalformedRows, Row, question_key
from llmquest_rl.data.stream import PromptStream, SequenceGroupStream
from llmquest_rl.data.task import Task, open_task
from llmquest_rl.data.tasks import shapes, table
from llmquest_rl.data.tokenizer import PromptRenderer, Tokenizer, prompt_renderer
from llmquest_rl.options import Options
from llmquest_rl.types import ImageFormat, Message

MARK = 16
"""SmolLM2's `<empty_output>`, a reserved token."""
FORMAT = ImageFormat(MARK, tokens=3, channels=3, height=12, width=16)
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
READER = ImageReader(FORMAT, MEAN, STD)


def pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(pixels(10, 8, 3, seed=seed))))
    return path


@pytest.fixture(scope="module")
def seeing(tokenizer: Tokenizer) -> PromptRenderer:
    return prompt_renderer(tokenizer, system_prompt="Be brief.", images=READER)


# --- pixels


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("size", [(50, 40), (5, 7), (12, 16)])
def test_pixels_are_those_of_transformers(resample: int, size: tuple[int, int], tmp_path: Path) -> None:
    theirs = ViTImageProcessorPil(
        size={"height": 12, "width": 16}, image_mean=MEAN, image_std=STD, rescale_factor=1 / 128, resample=resample
    )
    theirs.save_pretrained(tmp_path)
    image = Image.fromarray(pixels(*size, 3))
    ours = image_reader(tmp_path, FORMAT).read([image])
    np.testing.assert_allclose(ours, theirs(image, return_tensors="np")["pixel_values"], atol=1e-6)
    assert (ours.shape, ours.dtype) == ((1, 3, 12, 16), np.float32)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_of_other_channels_become_the_models(mode: str) -> None:
    image = Image.fromarray(pixels(20, 30, 3)).convert(mode)
    theirs = ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=MEAN, image_std=STD)
    expected = theirs(image.convert("RGB"), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(READER.read([image]), expected, atol=1e-6)
    grey = ImageReader(replace(FORMAT, channels=1), (0.5,), (0.5,)).read([image])
    theirs = ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=[0.5], image_std=[0.5])
    np.testing.assert_allclose(grey, theirs(image.convert("L"), return_tensors="np")["pixel_values"], atol=1e-6)


def test_every_raw_form_of_an_image_is_the_same_image(tmp_path: Path) -> None:
    array = pixels(20, 30, 3)
    image = Image.fromarray(array)
    content = encoded(image)
    path = tmp_path / "image.png"
    path.write_bytes(content)
    hub: list[dict[str, Any]] = [{"bytes": content, "path": "somewhere.png"}, {"bytes": None, "path": str(path)}]
    forms = [image, str(path), path, content, *hub, array, array.transpose(2, 0, 1)]
    assert check_images(forms) is None
    read = READER.read(forms)
    assert read.shape == (len(forms), 3, 12, 16)
    assert (read == read[0]).all()
    grey = [array[:, :, 0], array[:, :, :1], array[:, :, :1].transpose(2, 0, 1)]
    assert (READER.read(grey) == READER.read([Image.fromarray(array[:, :, 0])])).all()


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(image, "JPEG", exif=exif))
    theirs = ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=MEAN, image_std=STD)
    expected = theirs(load_image(str(path)), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(READER.read([path]), expected, atol=1e-6)


def test_without_a_file_mean_and_deviation_are_a_half(tmp_path: Path) -> None:
    read = image_reader(tmp_path, FORMAT).read([np.full((12, 16, 3), 255, np.uint8), np.zeros((12, 16, 3), np.uint8)])
    assert (read[0] == 1).all() and (read[1] == -1).all()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"do_center_crop": true}', "do_center_crop"),
        ('{"image_mean": [0.5]}', "1 numbers in image_mean"),
        ('{"image_std": [0.5, 0, 0.5]}', "image_std holds 0"),
        ('{"resample": 9}', "resample 9"),
    ],
)
def test_a_preprocessor_config_that_is_not_done_here_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(DataError, match=says):
        image_reader(tmp_path, FORMAT)
    with pytest.raises(DataError, match="images of 2 channels"):
        image_reader(tmp_path, replace(FORMAT, channels=2))


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("missing.png", "missing.png.*No such file"),
        (b"no image", "cannot identify"),
        (3, "a int is not an image: expected a path"),
        (np.zeros((4, 4, 3)), "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), "shape \\[2, 4, 4, 3\\]"),
        ({"bytes": None, "path": "gone.png"}, "gone.png"),
        (Image.new("I;16", (4, 4)), "more than 8 bits"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        READER.read([image])


def test_another_image_is_another_question() -> None:
    a, b = pixels(4, 4, 3), pixels(4, 4, 3, seed=1)
    images: list[Any] = ["a.png", "b.png", a, b, Image.fromarray(a), Image.fromarray(b), encoded(Image.fromarray(a))]
    keys = [question_key("What?"), *(question_key("What?", [image]) for image in images)]
    assert len(set(keys)) == len(keys)
    assert question_key("What?", ["a.png", "b.png"]) != question_key("What?", ["b.png", "a.png"])
    assert question_key(" What?", [a.copy()]) == question_key("What?", [a])
    assert question_key("What?", [{"bytes": b"x", "path": None}]) == question_key("What?", [b"x"])


# --- prompts


def spelt(renderer: PromptRenderer, ids: list[int]) -> str:
    return str(renderer.tokenizer.decode(ids)).replace("<empty_output>" * 3, "[IMAGE]")


def test_images_stand_where_they_are_marked_or_before_the_first_question(seeing: PromptRenderer) -> None:
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    assert spelt(seeing, seeing.prompt_ids("What?", 2)) == f"{head}[IMAGE][IMAGE]What?{tail}"
    assert spelt(seeing, seeing.prompt_ids("A <image> B<image>", 2)) == f"{head}A [IMAGE] B[IMAGE]{tail}"
    messages: list[Message] = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "I wrote <image>."},
        {"role": "user", "content": "Sure?"},
    ]
    ids = seeing.prompt_ids(messages, 1)
    assert "user\n[IMAGE]What?" in spelt(seeing, ids) and "I wrote <image>." in spelt(seeing, ids)
    assert ids.count(MARK) == 3
    assert seeing.decode(ids).count("<image>What?") == 1


def test_base_models_see_images_in_plain_prompts(tokenizer: Tokenizer) -> None:
    plain = prompt_renderer(tokenizer, chat_template="none", images=READER)
    assert spelt(plain, plain.prompt_ids("2 + <image> =", 1)) == "2 + [IMAGE] ="
    assert spelt(plain, plain.prompt_ids("What?", 1)) == "[IMAGE]What?"
    assert plain.prompt_ids("What?") == tokenizer.encode("What?")


@pytest.mark.parametrize(
    ("prompt", "images", "says"),
    [
        ("<image> and <image>", 1, "2 places for images .*, but 1 images"),
        ("<image>", 0, "1 places for images .*, but 0 images"),
        ("What? <empty_output>", 1, "4|2 image tokens"),
        ("What? <empty_output>", 0, "1 image tokens .*'<empty_output>', id 16.*, but 0 images"),
        ([{"role": "system", "content": "Nobody asks."}], 1, "0 places for images .*, but 1 images"),
    ],
)
def test_places_and_images_must_be_as_many(prompt: Any, images: int, says: str, seeing: PromptRenderer) -> None:
    with pytest.raises(DataError, match=says):
        seeing.prompt_ids(prompt, images)


def test_a_text_model_refuses_images_and_reads_the_mark_as_text(renderer: PromptRenderer) -> None:
    with pytest.raises(DataError, match="reads text only: choose a vision-language model"):
        renderer.prompt_ids("What?", 1)
    assert "I see <image>." in renderer.decode(renderer.prompt_ids("I see <image>."))


@pytest.mark.parametrize("token", [10**6, 198])
def test_an_image_token_that_the_tokenizer_cannot_write_is_refused(token: int, tokenizer: Tokenizer) -> None:
    """One outside of it; and a line break, which its own name for it does not encode to."""
    with pytest.raises(DataError, match=f"image_token_id {token} .*choose a reserved token"):
        prompt_renderer(tokenizer, images=replace(READER, format=replace(FORMAT, token_id=token)))


# --- tasks


def load_table(jsonl: Callable[..., str], rows: list[Any], malformed: MalformedRows, **options: Any) -> Task:
    columns = table.Columns(images="picture")
    return table.load(table.Config(path=jsonl(rows), columns=columns, **options), 0, malformed)


def test_a_table_has_images_beside_its_file(jsonl: Callable[..., str], seeing: PromptRenderer, tmp_path: Path) -> None:
    for i in range(4):
        png(tmp_path / "images" / f"{i}.png", seed=i)
    rows: list[Any] = [{"prompt": "What?", "answer": i, "picture": f"images/{i}.png", "level": i} for i in range(3)]
    rows.append({"prompt": "Both?", "answer": "x", "picture": ["images/0.png", str(tmp_path / "images" / "1.png")]})
    rows.append({"prompt": "None?", "answer": "y", "picture": None})
    task = load_table(jsonl, rows, MalformedRows(), held_out_share=0.2)
    stream = PromptStream(task, seeing, seed=0, max_prompt_tokens=40)
    problems = [*stream.take(4), *stream.held_out(1)]
    assert len({problem.id for problem in problems}) == 5, "one question about three images is three questions"
    for problem in problems:
        paths = {"x": [0, 1], "y": []}.get(problem.answer, [problem.answer])
        assert problem.prompt_ids.count(MARK) == 3 * len(paths)
        assert (problem.images is None) == (not paths)
        if problem.images is not None:
            assert (problem.images == READER.read([tmp_path / "images" / f"{i}.png" for i in paths])).all()
        assert "picture" not in problem.columns
    with pytest.raises(DataError, match="have more than 20 tokens"):
        PromptStream(task, seeing, seed=0, max_prompt_tokens=20).take(5)


def test_a_table_counts_rows_whose_image_is_missing_or_none(jsonl: Callable[..., str], tmp_path: Path) -> None:
    png(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    rows = [{"prompt": f"{i}?", "answer": "a", "picture": name} for i, name in enumerate(["good.png"] * 2)]
    rows += [{"prompt": "2?", "answer": "a", "picture": name} for name in ("bad.png", "gone.png")]
    malformed = MalformedRows("drop")
    task = load_table(jsonl, rows, malformed)
    assert (task.train.size, task.held_out.size, malformed.count) == (1, 1, 2)
    assert "rows.jsonl:3: " in malformed.reports[0] and "bad.png: not a readable image" in malformed.reports[0]
    assert "rows.jsonl:4: " in malformed.reports[1] and "(column 'picture')" in malformed.reports[1]
    with pytest.raises(DataError, match="no column 'picture' \\(columns.images\\)"):
        load_table(jsonl, [{"prompt": "a", "answer": "b"}], MalformedRows("drop"))


def drawn(seed: int) -> list[dict[str, Any]]:
    return [{"prompt": "What?", "answer": i, "images": pixels(6, 6, 3, seed=seed + i), "level": i} for i in range(6)]


def test_functions_of_users_give_images(seeing: PromptRenderer, context: Callable[..., DatasetContext]) -> None:
    task = open_task("file.py:drawn", drawn, Options(), 0, MalformedRows())
    (problem,) = PromptStream(task, seeing, seed=0).take(1)
    assert problem.images is not None
    assert (problem.images == READER.read([pixels(6, 6, 3, seed=problem.answer)])).all()
    assert problem.columns == {"level": problem.answer}
    with pytest.raises(DataError, match="row 0: an image \\(int\\): not a readable image"):
        open_task("f.py:f", lambda: [{"prompt": "a", "answer": 1, "images": 3}], Options(), 0, MalformedRows())

    def captions() -> list[dict[str, Any]]:
        return [{**row, "completion": "noise"} for row in drawn(0)]

    data = open_dataset("file.py:captions", captions, Options(), context(texts=seeing, images=READER))
    assert len(data.train) + len(data.validation) == 6
    assert all(group.images is not None and group.prompt.count(MARK) == 3 for group in data.train)


def test_a_hub_data_set_keeps_its_images_encoded(seeing: PromptRenderer, tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    images = [Image.fromarray(pixels(6, 6, 3, seed=i)) for i in range(3)]
    features = Features({"one": ImageFeature(), "several": List(ImageFeature()), "text": Value("string")})
    rows = {"one": images, "several": [images[:2], [], images], "text": ["a", "b", "c"]}
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / "train.parquet")
    for column, counts in (("one", [1, 1, 1]), ("several", [2, 0, 3])):
        read = [row[column] for _, row in read_hub(str(tmp_path / "data"), None, "train", column)]
        assert [len(found) for found in read] == counts
        assert all(isinstance(image["bytes"], bytes) for found in read for image in found)
        assert (READER.read(read[0]) == READER.read(images[: counts[0]])).all()


# --- sequences


def captions(jsonl: Callable[..., str], folder: Path, count: int = 4) -> str:
    for i in range(count):
        png(folder / f"{i}.png", seed=i)
    return jsonl([{"prompt": "What?", "completion": f"Number {i}.", "image": f"{i}.png"} for i in range(count)])


def test_images_of_sequences_are_read_when_asked_for(
    jsonl: Callable[..., str], tmp_path: Path, seeing: PromptRenderer, context: Callable[..., DatasetContext]
) -> None:
    config = sft.Config(path=captions(jsonl, tmp_path), columns=sft.Columns(images="image"))
    data = sft.load(config, context(texts=seeing, images=READER))
    assert (len(data.train), len(data.validation)) == (3, 1), "the same words about another image: another question"
    for i in range(4):
        png(tmp_path / f"{i}.png", seed=i + 100)
    stream = SequenceGroupStream(data, seed=0)
    for group in stream.take(3):
        number = int(seeing.decode(group.completions[0])[len("Number ")])
        assert group.images is not None
        assert (group.images.numpy() == READER.read([tmp_path / f"{number}.png"])).all(), "what is there now"
        assert spelt(seeing, group.prompt).endswith("user\n[IMAGE]What?<|im_end|>\n<|im_start|>assistant\n")
    for i in range(4):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(DataError, match="\\d.png: not a readable image"):
        stream.take(1)


def test_rows_with_images_that_cannot_be_learnt_are_refused(
    jsonl: Callable[..., str], tmp_path: Path, seeing: PromptRenderer, context: Callable[..., DatasetContext]
) -> None:
    columns = sft.Columns(images="image")
    path = captions(jsonl, tmp_path)
    made = context(texts=seeing, images=READER)
    with pytest.raises(DataError, match="rows.jsonl:1: .*set mask_prompt"):
        sft.load(sft.Config(path=path, columns=columns, mask_prompt=False), made)
    with pytest.raises(DataError, match="rows.jsonl:1: .*reads text only"):
        sft.load(sft.Config(path=path, columns=columns), context())
    turns = [("user", "What?"), ("assistant", "This."), ("user", "And <image>?"), ("assistant", "That.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = jsonl([{"messages": messages, "image": ["0.png"]}])
    with pytest.raises(DataError, match="rows.jsonl:1: there is an image after the first reply"):
        sft.load(sft.Config(path=path, columns=columns), made)
    with pytest.raises(DataError, match="rows.jsonl:1 has no column 'img'"):
        sft.load(sft.Config(path=path, columns=sft.Columns(images="img")), made)
    path = jsonl([{"prompt": "What?", "completion": "x", "image": ["gone.png"]}])
    with pytest.raises(DataError, match="rows.jsonl:1: .*gone.png: not a readable image"):
        sft.load(sft.Config(path=path, columns=columns), made)


# --- shapes


def flat(row: Row) -> bytes:
    return np.asarray(row.images[0]).tobytes()


@pytest.mark.parametrize("ask", ["colour", "shape", "count"])
def test_shapes_are_drawn_as_they_are_asked_about(ask: Any) -> None:
    config = shapes.Config(ask=ask, held_out=20, size=40)
    task, again, other = (shapes.load(config, seed, MalformedRows()) for seed in (0, 0, 1))
    rows = [task.train.row(i) for i in range(200)]
    assert [(row.prompt, flat(row)) for row in rows] == [(r.prompt, flat(r)) for r in map(again.train.row, range(200))]
    assert flat(rows[0]) != flat(other.train.row(0))
    assert task.held_out.size == 20
    held_out = {(str(row.prompt), flat(row)) for row in map(task.held_out.row, range(20))}
    assert not held_out & {(str(row.prompt), flat(row)) for row in rows}
    assert {row.images[0].size for row in rows} == {(40, 40)}
    answers = {"colour": set(config.colours), "shape": set(config.shapes), "count": set("01234")}
    assert {row.answer for row in rows} == answers[ask]


def test_counted_shapes_are_in_the_picture() -> None:
    """With one kind of shape the number of blobs is the answer, because shapes do not touch."""
    config = shapes.Config(shapes=("square",), colours=("white",), most=9, held_out=4, size=48)
    task = shapes.load(config, 0, MalformedRows())
    for row in map(task.train.row, range(50)):
        assert blobs(np.asarray(row.images[0])[:, :, 0] > 0) == int(row.answer)


def blobs(mask: NDArray[np.bool_]) -> int:
    """Connected parts."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    number = 0
    while left:
        number += 1
        edge = [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            edge += near
    return number


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 15}, "no room for 4 shapes: set `size` to at least 16"),
        ({"colours": ()}, "name at least one"),
        ({"template": "What?"}, "must contain {question}"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shapes.Config.model_validate(options)


def test_gold_answers_about_shapes_become_replies(
    seeing: PromptRenderer, context: Callable[..., DatasetContext]
) -> None:
    config = sft.Config(task={"name": "shapes", "ask": "colour", "held_out": 8}, task_rows=30)
    data = sft.load(config, context(texts=seeing, images=READER))
    assert (len(data.train), len(data.validation)) == (30, 8)
    group = data.train[0]
    assert group.images is not None and tuple(group.images.shape) == (1, 3, 12, 16)
    assert seeing.decode(group.completions[0]).removesuffix("<|im_end|>") in shapes.COLOURS


def test_rows_of_a_text_model_stay_as_they_were(renderer: PromptRenderer) -> None:
    rows = ListedRows([Row(str(i), f"{i}?", str(i)) for i in range(3)])
    (problem,) = PromptStream(Task("t", rows, rows), renderer, seed=0).take(1)
    assert problem.images is None
    assert json.dumps(problem.prompt_ids)
