"""Make assets/photos from a folder of openly licensed photos and its SOURCES.csv, with the credits that go with them.

    python tools/make/make_photos.py --candidates FOLDER --output_dir assets/photos

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
SIDE = 256  # px
HEAD = f"""# Credits of the embedded photos

Resized to {SIDE} px on the short side and cropped to a square by `tools/make/make_photos.py`. All are CC0 or in
the public domain.

| photo | author | licence | taken from | source |
|---|---|---|---|---|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", required=True, type=Path, help="folder of photos with SOURCES.csv")
    parser.add_argument("--output_dir", required=True, type=Path, help="gets train/, eval/ and CREDITS.md")
    args = parser.parse_args()
    credits = HEAD
    for source in csv.DictReader((args.candidates / "SOURCES.csv").read_text("utf-8").splitlines()):
        name = Path(source["file"]).stem.removeprefix("cc0_")
        if name in LEFT_OUT or not source["licence"].startswith(("CC0", "Public domain")):
            continue
        place = Path("eval" if name in EVAL else "train") / f"{name}.jpg"
        (args.output_dir / place).parent.mkdir(parents=True, exist_ok=True)
        photo = Image.open(args.candidates / source["file"]).convert("RGB")
        ImageOps.fit(photo, (SIDE, SIDE), Image.Resampling.LANCZOS).save(args.output_dir / place, quality=92, optimize=True)
        columns = (source[column] for column in ("author", "licence", "source_package", "source_url"))
        credits += f"| {place.as_posix()} | {' | '.join(columns)} |\n"
    (args.output_dir / "CREDITS.md").write_text(credits, encoding="utf-8")


if __name__ == "__main__":
    main()
