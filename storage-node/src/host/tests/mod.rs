mod background;
mod damage;
mod fencing;
mod sessions;
mod support;
