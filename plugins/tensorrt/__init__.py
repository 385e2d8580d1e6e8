"""The plugin as TensorRT sees it: classes, creators, serialised fields, and one step on the device."""
