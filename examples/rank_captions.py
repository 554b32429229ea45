"""Ranks captions for each picture by a checkpoint, as probabilities.

python examples/rank_captions.py CHECKPOINT PICTURE... --captions "A red kite." "A cat sleeps."
"""

import argparse

import torch
from PIL import Image

import himo


def main() -> None:
    parser = argparse.ArgumentParser(description="which caption fits a picture best")
    parser.add_argument("checkpoint", help="of any format that himo loads")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--captions", nargs="+", required=True)
    args = parser.parse_args()

    model, preprocess = himo.load(args.checkpoint)
    with torch.no_grad():
        texts = model.encode_text(himo.tokenize(args.captions), normalize=True)
        for path in args.pictures:
            with Image.open(path) as picture:
                image = model.encode_image(preprocess(picture)[None], normalize=True)
            probabilities = (model.logit_scale.exp() * image @ texts.T).softmax(dim=-1)[0]
            best = int(probabilities.argmax())
            print(f"{path}: {probabilities[best]:.1%} {args.captions[best]}")


if __name__ == "__main__":
    main()
