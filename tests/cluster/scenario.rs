//! What is tried, by subject. Each scenario leaves the cluster as the next one expects it.

pub(crate) mod change;
pub(crate) mod fault;
pub(crate) mod install;
pub(crate) mod observe;
pub(crate) mod refuse;
pub(crate) mod scale;
pub(crate) mod serve;
pub(crate) mod survive;
