"""From a folder of scans to batches: layouts, readers, checks, plan, cache, splits, augmentation; phantoms."""
