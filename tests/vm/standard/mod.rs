//! Controllers of all kinds in a machine as it should be.

mod commands;
mod contents;
mod groups;
mod identify;
mod lifecycle;
mod limits;
mod load;
mod mappings;
mod refusals;
mod stray;
