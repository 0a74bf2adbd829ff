//! The parts that models are made of: pure functions over rows of f32, with weights in the file's type.

pub(crate) mod kernels;
pub(crate) mod matrix;
pub(crate) mod mla;
pub(crate) mod mlp;
pub(crate) mod moe;
pub(crate) mod norm;
pub(crate) mod plain;
pub(crate) mod product;
pub(crate) mod rope;
pub(crate) mod threads;
