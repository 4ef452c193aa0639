"""`tars_kernels` inside of trainers that exist already; each module needs the package that it is named after."""
