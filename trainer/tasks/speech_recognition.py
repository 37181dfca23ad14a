"""Speech recognition: write down what is said, with connectionist temporal classification (Graves et al. 2006)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import read_json, write_json
from trainer.tasks import Batch, ReportRow, Sums, Task, facts_of
from trainer.tasks.edit_distance import best_constant, edit_distance
from trainer.tasks.transformers_logs import no_bars_into_logs

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 16  # transcripts
FEW = 20  # transcripts that the best constant output is sought on
BLANKS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # probabilities of the blank that the best constant one is sought among
RATE = 16_000
FRAMES = (320, 640)  # samples between two outputs of the best constant one


class SpeechRecognition(Task):
    """Batches hold `audio`, int16 (samples, time), `text`, int16 (samples, characters), and the length of each:
    `audio_length` and `text_length`, int64 (samples,)."""

    name = "speech_recognition"
    unit = "seconds of sound"
    loss_unit = "nats a character"
    baseline_label = "Best constant output"
    rows = (
        ReportRow("Character error rate", "cer", "constant_cer", "{:.1%}", better="lower"),
        ReportRow("Word error rate", "wer", "constant_wer", "{:.1%}"),
    )
    pipeline_tag = "automatic-speech-recognition"
    how_to_load = """\
from transformers import AutoModelForCTC, AutoProcessor

model, processor = AutoModelForCTC.from_pretrained("."), AutoProcessor.from_pretrained(".")
"""

    def loss(self, model: "nn.Module", batch: Batch) -> "Tensor":
        """The CTC loss, in nats a character."""
        return self._nats(*self._logits(model, batch), batch) / batch["text_length"].sum()

    def tokens(self, batch: Batch) -> int:
        return int(batch["audio_length"].sum()) // RATE

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        """`nats`, and how many of the `chars` and `words` are wrong."""
        logits, lengths = self._logits(model, batch)
        nats = self._nats(logits, lengths, batch).item()
        return {"nats": nats, **_errors(zip(_heard(logits, lengths), _said(batch), strict=True))}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` in nats a character; `cer` and `wer`, wrong characters and words by those that are said; and those of
        the best `constant` output."""
        scores = {
            "loss": sums["nats"] / sums["chars"],
            "cer": sums["char_errors"] / sums["chars"],
            "wer": sums["word_errors"] / sums["words"],
        }
        if "constant_char_errors" in sums:
            nats = min(value for name, value in sums.items() if name.startswith("constant_nats_"))
            scores["constant_loss"] = nats / sums["chars"]
            scores["constant_cer"] = sums["constant_char_errors"] / sums["chars"]
            scores["constant_wer"] = sums["constant_word_errors"] / sums["words"]
        return scores

    def export(self, model: "nn.Module", data: Path, directory: Path) -> None:
        """A Hugging Face directory: `AutoModelForCTC` and `AutoProcessor` load it."""
        from transformers import PreTrainedModel, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

        assert isinstance(model, PreTrainedModel)
        no_bars_into_logs()
        model.save_pretrained(directory)
        vocabulary = read_json(data / "manifest.json")["for_model"]["vocabulary"]
        write_json(directory / "vocab.json", {character: number for number, character in enumerate(vocabulary)})
        Wav2Vec2Processor(
            Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=_takes_mask(model)),
            Wav2Vec2CTCTokenizer(str(directory / "vocab.json")),
        ).save_pretrained(directory)

    def load(self, directory: Path) -> "nn.Module":
        import torch
        from transformers import AutoModelForCTC

        no_bars_into_logs()
        return AutoModelForCTC.from_pretrained(directory, local_files_only=True, dtype=torch.float32)

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """The best constant output: the one transcript that fits the training transcripts best; and, for the loss, the
        letters' frequencies in them at every moment, with the best share of blanks."""
        import torch

        texts = facts_of(data)["transcripts"]
        constant = best_constant(texts[:FEW])
        vocabulary = read_json(data / "manifest.json")["for_model"]["vocabulary"]
        counts = Counter("".join(texts).replace(" ", "|"))
        frequencies = torch.tensor([counts[letter] + (number > 3) for number, letter in enumerate(vocabulary)]).double()
        frequencies /= frequencies.sum()

        def score(batch: Batch) -> dict[str, Any]:
            found = _errors((constant, said) for said in _said(batch))
            sums = {f"constant_{name}": found[name] for name in ("char_errors", "word_errors")}
            for frame, blank in product(FRAMES, BLANKS):
                output = frequencies * (1 - blank)
                output[0] = blank
                lengths = batch["audio_length"].cpu() // frame
                logits = output.log().clamp(min=-30).expand(len(lengths), int(lengths.max()), -1)
                sums[f"constant_nats_{frame}_{blank}"] = self._nats(logits, lengths, batch).item()
            return sums

        return score

    def headline(self, scores: Mapping[str, Any]) -> str:
        return (
            f"{scores['cer']:.1%} of the characters are wrong, at {scores['loss']:.2f} nats a character; "
            f"the best constant output gives {scores['constant_cer']:.1%} and {scores['constant_loss']:.2f}"
        )

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`rows` of a table: what is said in some clips, and what was heard."""
        heard = _heard(*self._logits(model, batch))
        rows = [list(pair) for pair in zip(_said(batch), heard, strict=True)]
        return {"title": "Transcripts", "head": ["Said", "Heard"], "rows": rows[:SHOWN]}

    def _logits(self, model: "nn.Module", batch: Batch) -> "tuple[Tensor, Tensor]":
        """(samples, frames, vocabulary), and how many frames of each count, int64 (samples,)."""
        import torch

        audio, lengths = batch["audio"].float() / 32768, batch["audio_length"]
        inside = torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]
        mean = (audio * inside).sum(dim=1, keepdim=True) / lengths[:, None]
        centred = (audio - mean) * inside
        scaled = centred / (centred.square().sum(dim=1, keepdim=True) / lengths[:, None] + 1e-7).sqrt()
        recogniser: Any = model
        mask = inside.long() if _takes_mask(model) else None
        frames = recogniser._get_feat_extract_output_lengths(lengths)
        return recogniser(scaled, attention_mask=mask).logits, frames

    def _nats(self, logits: "Tensor", lengths: "Tensor", batch: Batch) -> "Tensor":
        """The CTC loss of all clips together. One that is too short for its transcript counts nothing."""
        import torch.nn.functional as F

        likely = logits.float().log_softmax(dim=-1).transpose(0, 1)
        text, sizes = batch["text"].long().to(logits.device), batch["text_length"].to(logits.device)
        return F.ctc_loss(likely, text, lengths, sizes, blank=0, reduction="sum", zero_infinity=True)


def _takes_mask(model: Any) -> bool:
    """Whether it is told where clips end: those with group norm were trained without."""
    return bool(model.config.feat_extract_norm == "layer")


def _said(batch: Batch) -> list[str]:
    from trainer.data.audio import written

    rows = zip(batch["text"].cpu().numpy(), batch["text_length"].tolist(), strict=True)
    return [written(row[:length]) for row, length in rows]


def _heard(logits: "Tensor", lengths: "Tensor") -> list[str]:
    """The most likely character of each frame; repeated ones once, and no blanks."""
    from trainer.data.audio import written

    texts = []
    for row, length in zip(logits.argmax(dim=-1).cpu(), lengths.tolist(), strict=True):
        collapsed = row[:length].unique_consecutive()
        texts.append(" ".join(written(collapsed[collapsed > 3].numpy()).split()))
    return texts


def _errors(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """What is wrong in what was heard, by what was said."""
    found = Counter[str]()
    for heard, said in pairs:
        found["char_errors"] += edit_distance(heard, said)
        found["chars"] += len(said)
        found["word_errors"] += edit_distance(heard.split(), said.split())
        found["words"] += len(said.split())
    return {name: float(found[name]) for name in ("char_errors", "chars", "word_errors", "words")}


TASK = SpeechRecognition()
