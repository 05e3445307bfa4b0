"""Official releases of the eight tasks in small, and the records that must come of them, written out by hand."""

import json
import pickle
from pathlib import Path

from PIL import Image

LANDSCAPE, PORTRAIT = (f"COCO2014/train2014/COCO_train2014_00000000000{number}.jpg" for number in (1, 2))
HOST = "http://ecx.images-amazon.com/images/I/"


# --- the official releases, in small ---


def ten(**counts: int) -> list[dict]:
    """Annotators' answers as VQAv2 and VizWiz hold them: each text as often as it was given."""
    return [{"answer": text, "answer_confidence": "yes"} for text, count in counts.items() for _ in range(count)]


def problem(question: str, choices: list[str], answer: int, hint: str, image: str | None) -> dict:
    fixed = {"lecture": "A long text.", "solution": "A longer one.", "grade": "grade2"}
    return {"question": question, "choices": choices, "answer": answer, "hint": hint, "image": image, **fixed}


def textvqa(question_id: int, image_id: str, question: str, answers: list[str]) -> dict:
    return {"question_id": question_id, "image_id": image_id, "question": question, "answers": answers}


def ocr(image_id: str, *tokens: str) -> dict:
    return {"image_id": image_id, "ocr_tokens": tokens, "ocr_info": [{"word": token} for token in tokens]}


def gqa(image_id: str, question: str, answer: str) -> dict:
    said = {"imageId": image_id, "question": question, "answer": answer, "fullAnswer": f"It is {answer}."}
    types = {"structural": "verify", "semantic": "attr", "detailed": "exist"}
    return said | {"isBalanced": True, "types": types, "groups": {"global": None}, "annotations": {"answer": {}}}


def vqa(split: str, *rows: tuple[int, int, str, dict[str, int]]) -> dict[str, dict]:
    """The two files of a split of VQAv2; rows are (image id, question id, question, answers)."""
    questions = [{"image_id": image, "question_id": number, "question": text} for image, number, text, _ in rows]
    annotations = [
        {
            "question_id": number,
            "image_id": image,
            "multiple_choice_answer": max(given, key=given.get),
            "answers": ten(**given),
        }
        for image, number, _, given in reversed(rows)
    ]
    names = f"v2_OpenEnded_mscoco_{split}_questions.json", f"v2_mscoco_{split}_annotations.json"
    return dict(zip(names, ({"questions": questions}, {"annotations": annotations}), strict=True))


def book(split: int, url: str, questions: list[str], answers: list[str]) -> dict:
    return {"imageURL": url, "questions": questions, "answers": answers, "split": split, "title": "T", "genre": "G"}


def referring(release: str, splits: str) -> dict[str, list | dict]:
    """One of RefCOCO, RefCOCO+, RefCOCOg: a picture of 100 x 60 pixels and one of 80 x 200."""
    a, b = ("testA", "testB") if splits == "unc" else ("test", "test")
    rows = [  # annotation, picture, split, expressions by sentence id
        (11, 1, "train", {100: "the  lady in blue", 101: "blue shirt"}),
        (12, 2, "train", {102: "left post"}),
        (13, 1, "train", {103: "whole picture"}),
        (12, 2, "val", {104: "not used"}),
        (11, 1, a, {105: "woman"}),
        (12, 2, b, {106: "post: the tall one"}),
    ]
    refs = [
        {"ann_id": ann_id, "image_id": image_id, "split": split, "ref_id": number, "sent_ids": list(texts)}
        | {"sentences": [{"sent_id": i, "sent": text, "raw": text.title()} for i, text in texts.items()]}
        for number, (ann_id, image_id, split, texts) in enumerate(rows)
    ]
    sizes, boxes = {1: (100, 60), 2: (80, 200)}, {11: [10.0, 20.0, 50.0, 25.0], 12: [20, 50, 40, 100]}
    images = [
        {"id": i, "file_name": f"COCO_train2014_00000000000{i}.jpg", "width": width, "height": height}
        for i, (width, height) in sizes.items()
    ]
    boxes[13] = [0, 0, 100, 60]
    annotations = [{"id": i, "bbox": box, "segmentation": [[1, 2]]} for i, box in boxes.items()]
    instances = {"images": images, "annotations": annotations}
    return {f"{release}/refs({splits}).p": refs, f"{release}/instances.json": instances}


RELEASES = {  # official files by name: texts, lists for a pickle, JSON
    "ScienceQA": {
        "problems.json": {
            "1": problem("Which is farthest north?", ["Ohio", "Iowa", "Utah", "Maine"], 3, "", "image.png"),
            "2": problem("Which is wet?", ["sand", "rain"], 1, "Read the text.\nRain fell.", None),
            "3": problem("Which is hard?", ["butter", "glass", "wool"], 1, "Look at it.", "image.png"),
            "4": problem("Which is it?", ["this", "that"], 0, "", None),
            "5": problem("Is it cold?", ["yes", "no"], 0, "", None),
        },
        "pid_splits.json": {"train": ["1", "2"], "val": ["4"], "test": ["3", "5"], "minitest": ["3"]},
    },
    "TextVQA": {
        "TextVQA_0.5.1_train.json": {
            "data": [
                textvqa(0, "0054c9", "what is the brand?", ["nous", *["nokia"] * 4, *["nous"] * 3, "a", "b"]),
                textvqa(1, "0054c9", "who makes it?", ["nokia"] * 10),
            ]
        },
        "TextVQA_0.5.1_val.json": {
            "data": [
                textvqa(34602, "003a8a", "what is the brand of this?", ["dakota"] * 7 + ["dakota digital"] * 3),
                textvqa(34603, "0098e9", "what does it say?", ["stop"] * 10),
            ]
        },
        "TextVQA_Rosetta_OCR_v0.2_train.json": {"data": [ocr("0054c9", "NOKIA", "6300")]},
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [ocr("0098e9"), ocr("003a8a", "DAKOTA", "DIGITAL")]},
    },
    "ImageNet": {
        "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02119789 kit fox, Vulpes\n",
        "LOC_val_solution.csv": "ImageId,PredictionString\nval_3,n02119789 1 2 3 4 n02119789 5 6 7 8 \n"
        "val_2,n01443537 1 2 3 4 \nval_1,n01440764 1 2 3 4 \n",
        "synsets.txt": "n02119789\nn01440764\n",
    },
    "GQA": {
        "train_balanced_questions.json": {
            "04610": gqa("2370799", "What color is the cup?", "blue"),
            "04611": gqa("2370800", "Is it overcast?", "no"),
            "04612": gqa("2370799", "Is there a chair?", "yes"),
        },
        "testdev_balanced_questions.json": {
            "201307251": gqa("n161313", "Is it overcast?", "no"),
            "201640614": gqa("n161313", "Who is wearing the dress?", "woman"),
        },
    },
    "VizWiz": {
        "train.json": [{"image": "a.jpg", "question": "What is it?", "answers": ten(soap=4, unanswerable=6)}],
        "val.json": [{"image": "b.jpg", "question": "What colour is it?", "answers": ten(black=4, grey=6)}],
    },
    "Grounding": referring("refcoco", "unc") | referring("refcoco+", "unc") | referring("refcocog", "umd"),
    "VQAv2": vqa(
        "train2014",
        (9, 9000, "How many cookies?", {"2": 10}),
        (25, 25000, "Is it day?", {"yes": 10}),
        (9, 9001, "What colour?", {"green": 8, "blue": 2}),
    )
    | vqa("val2014", (42, 42000, "What is it?", {"boots": 4, "shoes": 6}), (42, 42001, "Is it?", {"no": 10})),
    "OCR-VQA": {
        "dataset.json": {
            "761183272": book(
                1, f"{HOST}61Y5cOdHJbL.jpg", ["Who wrote it? ", "What is the title?"], ["Mia Rey", "Calm"]
            ),
            "000195850X": book(2, f"{HOST}51.jpg", ["What is the title?"], ["Not used"]),
            "1449407501": book(
                3, f"{HOST}52.gif", ["Who wrote it?", "What is the title?"], ["Joe Day", "A Day: Notes"]
            ),
        }
    },
}
PICTURES = {
    "ScienceQA": ["ScienceQA/images/train/1/image.png", "ScienceQA/images/test/3/image.png"],
    "TextVQA": [f"TextVQA/train_images/{name}.jpg" for name in ("0054c9", "003a8a", "0098e9")],
    "ImageNet": [f"ImageNet_withlabel/val/val_{number}.JPEG" for number in (1, 2, 3)]
    + [f"ImageNet_withlabel/train/n02119789/n02119789_{number}.JPEG" for number in (10, 9)]
    + [f"ImageNet_withlabel/train/{synset}/{synset}_5.JPEG" for synset in ("n01440764", "n01443537")],
    "GQA": [f"GQA/images/{name}.jpg" for name in ("2370799", "2370800", "n161313")],
    "VizWiz": ["VizWiz/train/a.jpg", "VizWiz/val/b.jpg"],
    "Grounding": [LANDSCAPE, PORTRAIT],
    "VQAv2": [f"COCO2014/train2014/COCO_train2014_0000000000{number}.jpg" for number in ("09", "25")]
    + ["COCO2014/val2014/COCO_val2014_000000000042.jpg"],
    "OCR-VQA": ["OCR-VQA/images/761183272.jpg", "OCR-VQA/images/1449407501.gif"],
}


def save(path: Path, content: str | list | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    as_bytes = pickle.dumps(content, protocol=0) if path.suffix == ".p" else json.dumps(content).encode()
    path.write_bytes(content.encode() if isinstance(content, str) else as_bytes)


def draw(root: Path, name: str) -> None:
    path = root / "cl_dataset" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", {LANDSCAPE: (100, 60), PORTRAIT: (80, 200)}.get(name, (6, 4)), (90, 60, 30)).save(path)


def made(task: str, tmp_path: Path) -> tuple[Path, Path]:
    """The task's small release, and a data root with its pictures."""
    source, root = tmp_path / "official" / task, tmp_path / "root"
    for name, content in RELEASES[task].items():
        save(source / name, content)
    for name in PICTURES[task]:
        draw(root, name)
    return source, root


# --- what must come out, by hand; {} is the place of the instruction ---


def trained(record_id: str, image: str | None, *texts: str) -> dict:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": record_id, **({"image": image} if image else {}), "conversations": turns}


def asked(question_id: str | int, image: str | None, text: str, **fields) -> dict:
    return {"question_id": question_id, **({"image": image} if image else {}), "text": text, **fields}


def grounded(release: str) -> tuple[list[dict], list[dict]]:
    """Padding moves the landscape picture's boxes 20 down in a square of 100, the portrait's 60 right in one of 200."""
    shirt, post, stem = "[0.10, 0.40, 0.60, 0.65]", "[0.40, 0.25, 0.60, 0.75]", f"{release}-COCO_train2014_00000000000"
    lady = ("<image>\n{}: the lady in blue", shirt, "{}: blue shirt", shirt, "{}: whole picture")
    train = [trained(f"{stem}1", LANDSCAPE, *lady, "[0.00, 0.20, 1.00, 0.80]")]
    train += [trained(f"{stem}2", PORTRAIT, "<image>\n{}: left post", post)]
    first = {"answer_bbox": shirt, "origin_answer_bbox": "[0.10, 0.33, 0.60, 0.75]", "size": [100, 60]}
    second = {"answer_bbox": post, "origin_answer_bbox": "[0.25, 0.25, 0.75, 0.75]", "size": [80, 200]}
    test = [asked(f"{release}-105", LANDSCAPE, "{}: woman", **first)]
    return train, [*test, asked(f"{release}-106", PORTRAIT, "{}: post: the tall one", **second)]


NOKIA, FOX = "Reference OCR token: NOKIA, 6300", "ImageNet_withlabel/train/n02119789/n02119789"
TRAIN = {
    "ScienceQA": [
        trained(
            "1",
            "ScienceQA/images/train/1/image.png",
            "<image>\nWhich is farthest north?\nA. Ohio\nB. Iowa\nC. Utah\nD. Maine\n{}",
            "D",
        ),
        trained("2", None, "Context: Read the text.\nRain fell.\nWhich is wet?\nA. sand\nB. rain\n{}", "B"),
    ],
    "TextVQA": [  # "nous" as often as "nokia", and first
        trained("0", "TextVQA/train_images/0054c9.jpg", f"<image>\nwhat is the brand?\n{NOKIA}\n{{}}", "nous"),
        trained("1", "TextVQA/train_images/0054c9.jpg", f"<image>\nwho makes it?\n{NOKIA}\n{{}}", "nokia"),
    ],
    "ImageNet": [  # a picture of each class in turn, in the order of the synsets' file
        trained("n02119789_10", f"{FOX}_10.JPEG", "<image>\n{}", "kit fox"),
        trained("n01440764_5", "ImageNet_withlabel/train/n01440764/n01440764_5.JPEG", "<image>\n{}", "tench"),
        trained("n02119789_9", f"{FOX}_9.JPEG", "<image>\n{}", "kit fox"),
    ],
    "GQA": [
        trained(
            "2370799", PICTURES["GQA"][0], "<image>\nWhat color is the cup?\n{}", "blue", "Is there a chair?", "yes"
        ),
        trained("2370800", PICTURES["GQA"][1], "<image>\nIs it overcast?\n{}", "no"),
    ],
    "VizWiz": [trained("a", "VizWiz/train/a.jpg", "<image>\nWhat is it?\n{}", "unanswerable")],
    "Grounding": [record for release in ("refcoco", "refcoco+", "refcocog") for record in grounded(release)[0]],
    "VQAv2": [
        trained(
            "COCO_train2014_000000000009",
            "COCO2014/train2014/COCO_train2014_000000000009.jpg",
            *("<image>\nHow many cookies?\n{}", "2", "What colour?", "green"),
        ),
        trained("COCO_train2014_000000000025", PICTURES["VQAv2"][1], "<image>\nIs it day?\n{}", "yes"),
    ],
    "OCR-VQA": [
        trained(
            "761183272",
            "OCR-VQA/images/761183272.jpg",
            *("<image>\nWho wrote it?\n{}", "Mia Rey", "What is the title?", "Calm"),
        )
    ],
}
BRAND, SAY = (
    "what is the brand of this?\nReference OCR token: DAKOTA, DIGITAL",
    "what does it say?\nReference OCR token: ",
)
VAL2014, GIF = "COCO2014/val2014/COCO_val2014_000000000042.jpg", "OCR-VQA/images/1449407501.gif"
HARD = "Context: Look at it.\nWhich is hard?\nA. butter\nB. glass\nC. wool\n{}"
TEST = {
    "ScienceQA": [
        asked("3", "ScienceQA/images/test/3/image.png", HARD, answer="B"),
        asked("5", None, "Is it cold?\nA. yes\nB. no\n{}", answer="A"),
    ],
    "TextVQA": [
        asked(34602, "TextVQA/train_images/003a8a.jpg", f"{BRAND}\n{{}}", answer="dakota"),
        asked(34603, "TextVQA/train_images/0098e9.jpg", f"{SAY}\n{{}}", answer="stop"),
    ],
    "ImageNet": [
        asked("val_3", "ImageNet_withlabel/val/val_3.JPEG", "{}", answer="kit fox"),
        asked("val_1", "ImageNet_withlabel/val/val_1.JPEG", "{}", answer="tench"),
    ],
    "GQA": [
        asked("201307251", "GQA/images/n161313.jpg", "Is it overcast?\n{}", answer="no"),
        asked("201640614", "GQA/images/n161313.jpg", "Who is wearing the dress?\n{}", answer="woman"),
    ],
    "VizWiz": [
        asked(
            "b",
            "VizWiz/val/b.jpg",
            "What colour is it?\n{}",
            answer="grey",
            answers=["black"] * 4 + ["grey"] * 6,
        )
    ],
    "Grounding": [record for release in ("refcoco", "refcoco+", "refcocog") for record in grounded(release)[1]],
    "VQAv2": [
        asked(42000, VAL2014, "What is it?\n{}", answer="shoes", answers=["boots"] * 4 + ["shoes"] * 6),
        asked(42001, VAL2014, "Is it?\n{}", answer="no", answers=["no"] * 10),
    ],
    "OCR-VQA": [
        asked("1449407501-0", GIF, "Who wrote it?\n{}", answer="Joe Day"),
        asked("1449407501-1", GIF, "What is the title?\n{}", answer="A Day: Notes"),
    ],
}
