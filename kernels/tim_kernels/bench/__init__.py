"""Speed, bandwidth and memory of every op beside its twin, the compiled twin and libraries.

    python -m tim_kernels.bench                                  measure and print
    python -m tim_kernels.bench --out kernels/results/GPU.json   and store, with plots beside
    python -m tim_kernels.bench --out kernels/results/GPU.json --append --ops swiglu
                                                                 measure a part, and keep the rest
    python -m tim_kernels.bench --render kernels/results/GPU.json
    python -m tim_kernels.bench --tune                           which tile of attention's tangent is fastest

A row is measured only after its outputs and gradients agreed with the twin in float64 at that very size.
Results are stored after every size, and those set as goals are printed beside what was reached.
Without a GPU nothing is timed: the record of compiled resources and the byte model are printed instead.
"""
