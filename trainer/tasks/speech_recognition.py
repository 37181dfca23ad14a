"""Speech recognition: transcribe speech, with connectionist temporal classification (Graves et al. 2006)."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.files import write_json
from trainer.models import huggingface
from trainer.tasks import Batch, Generation, ReportRow, Sums, Task, files_of, manifest_of

if TYPE_CHECKING:
    from torch import Tensor, nn

SHOWN = 16  # transcripts
FEW = 20  # transcripts from which the best constant output is found
BLANKS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # candidate blank probabilities of the best constant output
RATE = 16_000
FRAMES = (320, 640)  # candidate samples per frame of the best constant output


class SpeechRecognition(Task):
    """Batches contain `audio`, int16 (samples, time), and `text`, int16 (samples, characters).

    They also contain the lengths, `audio_length` and `text_length`, int64 (samples,).
    """

    name = "speech_recognition"
    unit = "seconds of sound"
    loss_unit = "nats per character"
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
        """The CTC loss, in nats per character."""
        return self._nats(*self._logits(model, batch), batch) / batch["text_length"].sum()

    def tokens(self, batch: Batch) -> int:
        return int(batch["audio_length"].sum()) // RATE

    def score(self, model: "nn.Module", batch: Batch) -> dict[str, Any]:
        """`nats`, `chars` and `words`, and the numbers of wrong characters and words."""
        logits, lengths = self._logits(model, batch)
        nats = self._nats(logits, lengths, batch).item()
        return {"nats": nats, **_errors(zip(_decoded(logits, lengths), _transcripts(batch), strict=True))}

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` in nats per character, character and word error rates (`cer`, `wer`).

        The same scores of the best `constant` output are included.
        """
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
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

        huggingface.save(model, directory)
        vocabulary = manifest_of(data)["for_model"]["vocabulary"]
        write_json(directory / "vocab.json", {character: number for number, character in enumerate(vocabulary)})
        Wav2Vec2Processor(
            Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=_takes_mask(model)),
            Wav2Vec2CTCTokenizer(str(directory / "vocab.json")),
        ).save_pretrained(directory)

    def load(self, directory: Path) -> "nn.Module":
        return huggingface.load(directory, "AutoModelForCTC")

    def baseline(self, data: Path) -> Callable[[Batch], dict[str, Any]]:
        """The best constant output: the transcript closest to all training transcripts.

        For the loss, it is the letters' frequencies at every frame, with the best probability of a blank.
        """
        import torch

        # One transcript for all clips, and letter frequencies for the loss
        manifest = manifest_of(data)
        texts, vocabulary = manifest["facts"]["transcripts"], manifest["for_model"]["vocabulary"]
        constant = best_constant(texts[:FEW])
        counts = Counter("".join(texts).replace(" ", "|"))
        frequencies = torch.tensor([counts[letter] + (number > 3) for number, letter in enumerate(vocabulary)]).double()
        frequencies /= frequencies.sum()

        def score(batch: Batch) -> dict[str, Any]:
            found = _errors((constant, text) for text in _transcripts(batch))
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
            f"{scores['cer']:.1%} of the characters are wrong, at {scores['loss']:.2f} nats per character; "
            f"the best constant output gives {scores['constant_cer']:.1%} and {scores['constant_loss']:.2f}"
        )

    def sample(self, model: "nn.Module", directory: Path, batch: Batch, seed: int) -> dict[str, Any]:
        """`rows` of a table: the transcripts of some clips, and the recognised text."""
        recognised = _decoded(*self._logits(model, batch))
        rows = [list(pair) for pair in zip(_transcripts(batch), recognised, strict=True)]
        return {"title": "Transcripts", "head": ["Transcript", "Recognised"], "rows": rows[:SHOWN]}

    def generate(self, model: "nn.Module", directory: Path, asked: Generation) -> None:
        """Write a line with the transcript of each audio file."""
        import torch

        from trainer.data.speech import LONGEST, SHORTEST, decode

        device = next(model.parameters()).device
        for path in files_of(asked, "audio files"):
            try:
                audio = decode(path.read_bytes())
            except ValueError as error:
                raise ConfigError("INPUT", path, f"is not audio: {error}") from None
            if not SHORTEST <= len(audio) / RATE <= LONGEST:
                allowed = f"must be from {SHORTEST} to {LONGEST:.0f} seconds long, like the training clips"
                raise ConfigError("INPUT", path, allowed)
            batch = {"audio": torch.tensor(audio[None]), "audio_length": torch.tensor([len(audio)])}
            (text,) = _decoded(*self._logits(model, {name: column.to(device) for name, column in batch.items()}))
            asked.write(f"{path}: {text}\n")

    def _logits(self, model: "nn.Module", batch: Batch) -> "tuple[Tensor, Tensor]":
        """Logits, (samples, frames, vocabulary), and the number of valid frames of each, int64 (samples,)."""
        import torch

        # Normalise each clip to zero mean and unit variance, ignoring the padding
        audio, lengths = batch["audio"].float() / 32768, batch["audio_length"]
        inside = torch.arange(audio.shape[1], device=audio.device) < lengths[:, None]
        mean = (audio * inside).sum(dim=1, keepdim=True) / lengths[:, None]
        centred = (audio - mean) * inside
        scaled = centred / (centred.square().sum(dim=1, keepdim=True) / lengths[:, None] + 1e-7).sqrt()
        # Models without an attention mask see the padding, as in their training
        recogniser: Any = model
        mask = inside.long() if _takes_mask(model) else None
        frames = recogniser._get_feat_extract_output_lengths(lengths)
        return recogniser(scaled, attention_mask=mask).logits, frames

    def _nats(self, logits: "Tensor", lengths: "Tensor", batch: Batch) -> "Tensor":
        """The summed CTC loss of the clips; a clip too short for its transcript contributes 0."""
        import torch.nn.functional as F

        likely = logits.float().log_softmax(dim=-1).transpose(0, 1)
        text, sizes = batch["text"].long().to(logits.device), batch["text_length"].to(logits.device)
        return F.ctc_loss(likely, text, lengths, sizes, blank=0, reduction="sum", zero_infinity=True)


def _takes_mask(model: Any) -> bool:
    """Whether the model takes an attention mask: models with group norm were trained without one."""
    return bool(model.config.feat_extract_norm == "layer")


def _transcripts(batch: Batch) -> list[str]:
    from trainer.data.speech import written

    rows = zip(batch["text"].cpu().numpy(), batch["text_length"].tolist(), strict=True)
    return [written(row[:length]) for row, length in rows]


def _decoded(logits: "Tensor", lengths: "Tensor") -> list[str]:
    """Greedy decoding: the most likely character of each frame, with repeats and blanks removed."""
    from trainer.data.speech import written

    texts = []
    for row, length in zip(logits.argmax(dim=-1).cpu(), lengths.tolist(), strict=True):
        collapsed = row[:length].unique_consecutive()
        texts.append(" ".join(written(collapsed[collapsed > 3].numpy()).split()))
    return texts


def _errors(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Errors in pairs of recognised text and transcript."""
    found = dict.fromkeys(("char_errors", "chars", "word_errors", "words"), 0.0)
    for recognised, transcript in pairs:
        found["char_errors"] += edit_distance(recognised, transcript)
        found["chars"] += len(transcript)
        found["word_errors"] += edit_distance(recognised.split(), transcript.split())
        found["words"] += len(transcript.split())
    return found


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(other) + 1))
    for number, item in enumerate(one, start=1):
        diagonal, row[0] = row[0], number
        for place, found in enumerate(other, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (item != found))
    return row[-1]


def best_constant(texts: Sequence[str], longest: int = 10, letters: int = 12) -> str:
    """The constant output with the fewest character errors over all texts, found greedily.

    It has at most `longest` characters, out of the `letters` most frequent ones.
    """
    frequent = [letter for letter, _ in Counter("".join(texts)).most_common(letters)]
    best, errors = "", sum(map(len, texts))
    while len(best) < longest:
        tried = {best[:place] + letter + best[place:] for letter in frequent for place in range(len(best) + 1)}
        found = [(sum(edit_distance(one, text) for text in texts), one) for one in tried]
        fewest, longer = min(found, default=(errors, best))
        if fewest >= errors:
            break
        best, errors = longer, fewest
    return best


TASK = SpeechRecognition()
