"""Images as tensors: datasets, Kaggle's files, augmentation."""
