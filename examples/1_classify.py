"""Classify images: what is on each, and what it cost."""

import manidp
from manidp.data.images import load_sample
from manidp.predict import predict

sample = load_sample()  # 200 CIFAR-10 test images, uint8 (200, 32, 32, 3)
with manidp.load("manidp-res20", threads=2) as engine:  # or a checkpoint file, or a card's name on the hub
    predictions = predict(engine, sample.images)

right = sum(
    prediction.label == sample.classes[label] for prediction, label in zip(predictions, sample.labels, strict=True)
)
cheapest, most_expensive = (pick(prediction.macs for prediction in predictions) for pick in (min, max))
print(f"{right} of {len(sample)} right")
print(f"{cheapest / 1e6:.2f} to {most_expensive / 1e6:.2f} million multiply-adds an image")
