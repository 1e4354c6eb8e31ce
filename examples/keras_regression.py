"""Training with Keras and plain Horovod. Under Keras 3 every rank then trains alone: see keras_regression.diff."""

import horovod.tensorflow.keras as hvd
import keras
import numpy as np

hvd.init()
rng = np.random.default_rng(hvd.rank())
x = rng.standard_normal((256, 10)).astype("float32")
y = x.sum(1, keepdims=True) + 0.1 * rng.standard_normal((256, 1)).astype("float32")

keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.01))
model.compile(optimizer, loss="mse")
model.fit(x, y, batch_size=32, epochs=2, verbose=0, shuffle=False)
print(f"rank {hvd.rank()} ends at {sum(float(np.abs(w).sum()) for w in model.get_weights()):.9f}")
