mod background;
mod fencing;
mod sessions;
mod support;
