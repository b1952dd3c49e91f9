use super::super::rules::When;
use super::*;

const BYTES: usize = 64 << 10;

fn disk() -> Disk<Vec<u8>, u64> {
    Disk::new(vec![0; BYTES], 1)
}

fn now() -> Instant {
    Instant::now()
}

fn write(disk: &mut Disk<Vec<u8>, u64>, offset: u64, byte: u8) -> Option<(u64, Answer)> {
    let bytes = vec![byte; 4096];
    disk.submit(now(), Request::Write { offset, bytes }, offset)
}

fn read(disk: &mut Disk<Vec<u8>, u64>, offset: u64) -> Answer {
    let request = Request::Read { offset, length: 4096 };
    let (_, answer) = disk.submit(now(), request, 0).expect("it is answered at once");
    answer
}

fn flush(disk: &mut Disk<Vec<u8>, u64>) -> Answer {
    disk.submit(now(), Request::Flush, 0).expect("it is answered at once").1
}

fn done(answer: Option<(u64, Answer)>) -> bool {
    matches!(answer, Some((_, Ok(bytes))) if bytes.is_empty())
}

/// The one byte that a block consists of.
fn solid(answer: Answer) -> u8 {
    let bytes = answer.unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn");
    bytes[0]
}

#[test]
fn what_was_flushed_survives_every_cut_and_what_was_not_is_lost_by_some_seed() {
    let mut lost = 0;
    for seed in 0..20 {
        let mut disk = disk();
        assert!(done(write(&mut disk, 0, 1)));
        flush(&mut disk).unwrap();
        assert!(done(write(&mut disk, 4096, 2)));
        assert_eq!(disk.unflushed(), 8);
        let (cut, answers) = disk.power_cut(CutBy::Seed(seed)).unwrap();
        assert!(answers.is_empty() && cut.kept + cut.lost == 8);
        assert_eq!(read(&mut disk, 0), Err(Trouble::Eio), "there is no power");
        assert_eq!(flush(&mut disk), Err(Trouble::Eio));
        disk.power_on();
        assert_eq!(solid(read(&mut disk, 0)), 1);
        lost += u64::from(read(&mut disk, 4096).unwrap() != vec![2; 4096]);
    }
    assert!(lost >= 10, "{lost}");
}

#[test]
fn errors_strike_once_or_always_and_only_where_they_are_asked_for() {
    let mut disk = disk();
    assert!(done(write(&mut disk, 0, 1)));
    disk.add("read eio once".parse().unwrap()).unwrap();
    disk.add("write enospc always 8192..12288".parse().unwrap()).unwrap();
    disk.add("flush eio times 2".parse().unwrap()).unwrap();
    assert_eq!(read(&mut disk, 0), Err(Trouble::Eio));
    assert_eq!(solid(read(&mut disk, 0)), 1);
    for _ in 0..3 {
        assert_eq!(write(&mut disk, 8192, 1).unwrap().1, Err(Trouble::Enospc));
        assert!(done(write(&mut disk, 4096, 1)));
    }
    assert_eq!(flush(&mut disk), Err(Trouble::Eio));
    assert_eq!(flush(&mut disk), Err(Trouble::Eio));
    assert_eq!(disk.unflushed(), 16, "a flush that failed flushed nothing");
    flush(&mut disk).unwrap();
    assert_eq!(disk.unflushed(), 0);
    disk.heal();
    assert!(done(write(&mut disk, 8192, 1)));
    let counters = disk.counters();
    assert_eq!((counters.eio, counters.enospc), (3, 3));
}

#[test]
fn errors_at_a_rate_strike_about_that_often() {
    let mut disk = disk();
    disk.add(Rule {
        when: When::OneIn(10),
        ..Rule::always(None, Effect::Eio)
    })
    .unwrap();
    let failed = (0..1000).filter(|_| read(&mut disk, 0).is_err()).count();
    assert!((50..200).contains(&failed), "{failed}");
}

#[test]
fn slow_requests_are_done_when_their_time_has_come() {
    let mut disk = disk();
    disk.add("write delay 100".parse().unwrap()).unwrap();
    let start = now();
    let request = Request::Write {
        offset: 0,
        bytes: vec![3; 512],
    };
    assert_eq!(disk.submit(start, request, 7), None);
    assert_eq!(solid(read(&mut disk, 0)), 0, "it has not happened yet");
    assert_eq!(disk.next_due(), Some(start + Duration::from_millis(100)));
    assert_eq!(disk.due(start + Duration::from_millis(99)), []);
    assert_eq!(disk.due(start + Duration::from_millis(100)), [(7, Ok(Vec::new()))]);
    assert_eq!(read(&mut disk, 0).unwrap()[..512], [3; 512]);
}

#[test]
fn stuck_requests_wait_until_it_is_healed_or_its_power_is_cut() {
    let mut disk = disk();
    disk.add("any stick".parse().unwrap()).unwrap();
    assert_eq!(write(&mut disk, 0, 5), None);
    assert_eq!(disk.submit(now(), Request::Flush, 1), None);
    assert_eq!(disk.next_due(), None);
    assert_eq!(disk.due(now() + Duration::from_secs(3600)), []);
    assert_eq!(disk.waiting(), 2);
    assert_eq!(
        disk.heal(),
        [(0, Ok(Vec::new())), (1, Ok(Vec::new()))],
        "in their order"
    );
    assert_eq!((solid(read(&mut disk, 0)), disk.unflushed()), (5, 0));

    disk.add("any stick".parse().unwrap()).unwrap();
    let mut arrived = 0;
    for seed in 0..20 {
        assert_eq!(write(&mut disk, 4096, 6), None);
        let (_, answers) = disk.power_cut(CutBy::Seed(seed)).unwrap();
        assert_eq!(answers, [(4096, Err(Trouble::Eio))]);
        disk.power_on();
        disk.heal();
        arrived += u64::from(read(&mut disk, 4096).unwrap().contains(&6));
        assert!(done(write(&mut disk, 4096, 0)));
        flush(&mut disk).unwrap();
        disk.add("any stick".parse().unwrap()).unwrap();
    }
    assert!(
        (1..20).contains(&arrived),
        "a write that was under way may have arrived: {arrived} of 20"
    );
}

#[test]
fn lost_writes_and_flushes_are_answered_as_if_they_were_done() {
    let mut disk = disk();
    assert!(done(write(&mut disk, 0, 1)));
    disk.add("write lose once".parse().unwrap()).unwrap();
    assert!(done(write(&mut disk, 0, 2)));
    assert_eq!(solid(read(&mut disk, 0)), 1);
    disk.add("flush lose".parse().unwrap()).unwrap();
    flush(&mut disk).unwrap();
    assert_eq!(disk.unflushed(), 8);
    assert_eq!(disk.counters().lost, 2);
}

#[test]
fn a_misdirected_write_lands_elsewhere() {
    let mut disk = disk();
    disk.add("write misdirect once".parse().unwrap()).unwrap();
    assert!(done(write(&mut disk, 4096, 9)));
    assert_eq!(solid(read(&mut disk, 4096)), 0);
    let found: Vec<u64> = (0..BYTES as u64 / 4096)
        .filter(|i| solid(read(&mut disk, i * 4096)) == 9)
        .collect();
    assert_eq!(found.len(), 1);
    assert_eq!(disk.counters().misdirected, 1);
}

#[test]
fn of_a_stale_write_one_sector_stays_as_it_was() {
    for offset in [4096, 4096 + 100] {
        let mut disk = disk();
        disk.add("write stale once".parse().unwrap()).unwrap();
        assert!(done(write(&mut disk, offset, 9)));
        let (_, all) = disk
            .submit(
                now(),
                Request::Read {
                    offset: 0,
                    length: 16384,
                },
                0,
            )
            .unwrap();
        let all = all.unwrap();
        let old = all[offset as usize..][..4096].iter().filter(|byte| **byte == 0).count();
        assert!((1..=SECTOR).contains(&old), "{old} bytes are old");
        assert_eq!(all.iter().filter(|byte| **byte == 9).count(), 4096 - old);
        assert_eq!(disk.counters().stale, 1);
    }
}

#[test]
fn rot_flips_bits_for_good_where_data_is() {
    let mut disk = disk();
    assert!(done(write(&mut disk, 0, 0)));
    disk.add("read rot once".parse().unwrap()).unwrap();
    let ones = |bytes: Vec<u8>| bytes.iter().map(|byte| byte.count_ones()).sum::<u32>();
    assert_eq!(ones(read(&mut disk, 0).unwrap()), 1);
    assert_eq!(ones(read(&mut disk, 0).unwrap()), 1, "and stays so");
    assert_eq!(disk.rot(5, Some(8192..12288)).unwrap(), 5);
    assert!((1..=5).contains(&ones(read(&mut disk, 8192).unwrap())));
    assert_eq!(ones(read(&mut disk, 4096).unwrap()), 0);
    assert_eq!(disk.counters().rotten, 6);
}

#[test]
fn a_wiped_device_is_empty_and_a_swapped_one_is_the_other() {
    let mut disk = disk();
    assert!(done(write(&mut disk, 0, 1)));
    let old = disk.swap(vec![8; BYTES]).unwrap();
    assert_eq!(old[..4096], [1; 4096], "what was written is on the old one");
    assert_eq!(solid(read(&mut disk, 0)), 8);
    disk.wipe().unwrap();
    assert_eq!(solid(read(&mut disk, 0)), 0);
}

#[test]
fn requests_outside_of_the_device_fail() {
    let mut disk = disk();
    assert_eq!(read(&mut disk, BYTES as u64), Err(Trouble::Outside));
    assert_eq!(read(&mut disk, u64::MAX), Err(Trouble::Outside));
    assert_eq!(
        write(&mut disk, BYTES as u64 - 512, 0).unwrap().1,
        Err(Trouble::Outside)
    );
}

#[test]
fn there_are_not_more_rules_than_allowed() {
    let mut disk = disk();
    let rule = Rule::always(None, Effect::Eio);
    for _ in 0..SHIM_RULES_MAX {
        disk.add(rule.clone()).unwrap();
    }
    assert!(disk.add(rule).is_err());
}
