mod fencing;
mod sessions;
mod support;
