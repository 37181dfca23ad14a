"""Every model in its smallest size, with data that is read in a moment: for what all of them have in common."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

TEXT = {"dataset": "stdlib", "tokenizer": "bytes", "sequence_length": 32, "max_samples": 60}
TINY: dict[str, dict[str, Any]] = {
    "gpt-neo": {"model": "gpt-neo:test", **TEXT},
    "gpt-neo-x": {"model": "gpt-neo-x:test", **TEXT},
    "resnet50": {"model": "resnet50:test", "dataset": "digits", "max_samples": 100},
    "biggan": {"model": "biggan:test", "dataset": "digits", "image_size": 16, "max_samples": 60},
    "gcn": {"model": "gcn:test", "dataset": "ogbn_arxiv:{papers}"},
    "wav2vec2": {"model": "wav2vec2:test", "dataset": "files:{tones}"},
}
COMMON: dict[str, Any] = {
    "validation_fraction": 0.3,
    "device": "cpu",
    "batch_size": 4,
    "per_device_train_batch_size": 4,
    "eval_samples": 8,
    "wandb_logging": False,
}


def values_of(name: str, root: Path) -> dict[str, Any]:
    """The model's parameters; what its dataset is read from is made below `root`, unless it is there."""
    made = {"{papers}": papers, "{tones}": tones}
    values = dict(TINY[name])
    for place, make in made.items():
        folder = root / make.__name__
        if place in values["dataset"]:
            values["dataset"] = values["dataset"].replace(place, str(folder))
            if not folder.exists():
                make(folder)
    return values


def papers(folder: Path, nodes: int = 60) -> Path:
    """A folder laid out as ogbn-arxiv's archive is: a ring of papers in three subject areas."""
    random = np.random.default_rng(0)
    tables = {
        "raw/edge.csv.gz": [f"{n},{(n + 3) % nodes}" for n in range(nodes)],
        "raw/node-feat.csv.gz": [",".join(f"{value:.4f}" for value in random.normal(size=8)) for _ in range(nodes)],
        "raw/node-label.csv.gz": [str(n % 3) for n in range(nodes)],
        "mapping/labelidx2arxivcategeory.csv.gz": ["label idx,arxiv category", "0,cs.NA", "1,cs.MM", "2,cs.LO"],
    }
    for name, lines in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return folder


def tones(folder: Path, clips: int = 40) -> Path:
    """A folder of clips of 8 kHz in which each letter is a tone, with what is "said" beside them."""
    import soundfile

    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(clips):
        text = "".join(random.choice(list("ABC "), 4 + number % 5)).strip() or "A"
        pitches = [0 if letter == " " else 300 * (1 + "ABC".index(letter)) for letter in text]
        sound = np.concatenate([np.sin(2 * np.pi * pitch * np.arange(1200) / 8000) for pitch in pitches])
        soundfile.write(folder / f"{number}.wav", 0.3 * sound, 8000)
        (folder / f"{number}.txt").write_text(text)
    return folder
