mod background;
mod damage;
mod fencing;
mod fetch;
mod sessions;
mod support;
