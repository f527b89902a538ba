"""What the usual web filters, at their default thresholds, drop of clean embedded text, beside ours.

    pip install --no-deps datatrove==0.10.1
    pip install spacy jieba loguru dill multiprocess humanize tldextract nltk
    python dev/web_filter_losses.py

datatrove's own classes are run: Gopher's quality and repetition filters and FineWeb's quality filter, with the word
splitting that datatrove takes for the language.
"""

from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

from deepseek_training.data.cleaning.quality import fit_quality
from deepseek_training.data.texts import load_texts


def main() -> None:
    """Print a row for each text."""
    sources = {
        "medicine (en)": (load_texts("medicine", "all"), "eng_Latn"),
        "dialogues (zh)": (load_texts("dialogues_zh", "all", column="answer"), "cmn_Hani"),
    }
    for name, (texts, language) in sources.items():
        filters = (
            GopherQualityFilter(language=language),
            GopherRepetitionFilter(language=language),
            FineWebQualityFilter(language=language),
        )
        lost = [sum(_drops(one, text) for text in texts) / len(texts) for one in filters]
        halves = [number % 2 for number in range(len(texts))]
        ours = fit_quality([text[:4000] for text in texts], halves, fence=3.0, max_loss=None)
        dropped = [bool(ours.judge(ours.measure(text, half))) for text, half in zip(texts, halves, strict=True)]
        cells = [*lost, sum(dropped) / len(texts)]
        print(f"| {name} | {len(texts):,} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")


def _drops(one: object, text: str) -> bool:
    kept = one.filter(Document(text=text, id="0"))  # type: ignore[attr-defined]
    return kept is not True


if __name__ == "__main__":
    main()
