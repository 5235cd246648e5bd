"""Make assets/photos from a folder of openly licensed photos and its SOURCES.csv, with the credits that go with them.

    python tools/make_photos.py --candidates FOLDER --output_dir assets/photos

SOURCES.csv has the columns file, source_package, author, licence, source_url. Only CC0 and public-domain photos are taken.
"""

import argparse
import csv
from pathlib import Path

from PIL import Image, ImageOps

EVAL = {
    "budgie_roman-colosseum", "budgie_blue-periwinkle", "budgie_tea-gardens", "palapeli_cincinnati-bridge",
    "scipy_face-raccoon", "skimage_chelsea", "skimage_coffee", "wp24_art-gallery",
}  # fmt: skip
LEFT_OUT = {"skimage_hubble-deep-field", "wp25_404-image", "wp25_dallas-creek-square", "wp24_green-staircase"}  # little to see
SHORT_SIDE = 256  # px
QUALITY = 92  # JPEG


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", required=True, help="folder of photos with SOURCES.csv")
    parser.add_argument("--output_dir", required=True, help="gets train/, eval/ and CREDITS.md")
    args = parser.parse_args()
    candidates, output_dir = Path(args.candidates), Path(args.output_dir)

    lines = [
        "# Credits of the embedded photos",
        "",
        f"Resized to {SHORT_SIDE} px on the short side and cropped to a square by `tools/make_photos.py`. All are CC0 or in",
        "the public domain.",
        "",
        "| photo | author | licence | taken from | source |",
        "|---|---|---|---|---|",
    ]
    with open(candidates / "SOURCES.csv", newline="", encoding="utf-8") as file:
        sources = list(csv.DictReader(file))
    for source in sources:
        name = Path(source["file"]).stem.removeprefix("cc0_")
        free = source["licence"].startswith(("CC0", "Public domain"))
        if not free or name in LEFT_OUT:
            continue
        split = "eval" if name in EVAL else "train"
        photo = ImageOps.fit(
            Image.open(candidates / source["file"]).convert("RGB"), (SHORT_SIDE, SHORT_SIDE), Image.Resampling.LANCZOS
        )
        path = output_dir / split / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, quality=QUALITY, optimize=True)
        cells = (f"{split}/{name}.jpg", source["author"], source["licence"], source["source_package"], source["source_url"])
        lines.append(f"| {' | '.join(cells)} |")
    (output_dir / "CREDITS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines) - 7} photos written to {output_dir}")


if __name__ == "__main__":
    main()
