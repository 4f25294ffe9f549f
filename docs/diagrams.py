"""The diagrams at the top of the notebooks and the picture of the course: `python docs/diagrams.py` draws them as SVG.

One style for all: grey boxes are data, blue ones are models, white ones are steps of code.
"""

from html import escape
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "diagrams"
WIDTH, HEIGHT, GAP, DROP, MARGIN = 168, 56, 36, 34, 10  # of a box; between boxes, sideways and down; around all, pixels
FILL = {"data": "#eef0f2", "model": "#d7e6f5", "step": "#ffffff"}
DIAGRAMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def drawn(name: str) -> str:
    """Return a diagram as SVG."""
    about, boxes, arrows = (DIAGRAMS[name][part] for part in ("about", "boxes", "arrows"))
    place = {box[3]: (MARGIN + box[0] * (WIDTH + GAP), MARGIN + box[1] * (HEIGHT + DROP)) for box in boxes}
    width = max(x for x, _ in place.values()) + WIDTH + MARGIN
    height = max(y for _, y in place.values()) + HEIGHT + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" font-family="sans-serif">',
        f"<title>{escape(about)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#444"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',  # dark themes would hide the text
    ]
    for a, b in arrows:
        lines.append(f'<path d="{_route(place[a], place[b])}" fill="none" stroke="#444" marker-end="url(#head)"/>')
    for _, _, kind, title, caption in boxes:
        x, y = place[title]
        lines += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{FILL[kind]}" stroke="#444"/>',
            f'<text x="{x + WIDTH // 2}" y="{y + 24}" text-anchor="middle" font-size="14" font-weight="600">'
            f"{escape(title)}</text>",
            f'<text x="{x + WIDTH // 2}" y="{y + 43}" text-anchor="middle" font-size="11.5" fill="#333">'
            f"{escape(caption)}</text>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _route(start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return the path of an arrow: level in a row, upright in a column, else with one corner below or beside a box."""
    (x, y), (to_x, to_y) = start, end
    if y == to_y:
        return f"M{x + WIDTH} {y + HEIGHT // 2}H{to_x}"
    if x == to_x:
        return f"M{x + WIDTH // 2} {y if to_y < y else y + HEIGHT}V{to_y + HEIGHT if to_y < y else to_y}"
    if to_y > y:  # down, then sideways into the box
        return f"M{x + WIDTH // 2} {y + HEIGHT}V{to_y + HEIGHT // 2}H{to_x + WIDTH if to_x < x else to_x}"
    if to_x < x:  # back to the left, then up into the box
        return f"M{x} {y + HEIGHT // 2}H{to_x + WIDTH // 2}V{to_y + HEIGHT}"
    return f"M{x + WIDTH} {y + HEIGHT // 2}H{to_x - GAP // 2}V{to_y + HEIGHT // 2 + 8}H{to_x}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in DIAGRAMS:
        (FOLDER / f"{each}.svg").write_text(drawn(each), encoding="utf-8")
        print(FOLDER / f"{each}.svg")
