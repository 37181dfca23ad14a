"""Edit distance, for character and word error rates. Not a task itself."""

from collections import Counter
from collections.abc import Sequence


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(other) + 1))
    for number, item in enumerate(one, start=1):
        diagonal, row[0] = row[0], number
        for place, found in enumerate(other, start=1):
            diagonal, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, diagonal + (item != found))
    return row[-1]


def best_constant(texts: Sequence[str], longest: int = 10, letters: int = 12) -> str:
    """The one output with the fewest character errors over all texts, found greedily.

    Args:
        longest: Its maximum length, in characters.
        letters: Number of most frequent letters to choose from.
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
