import Foundation

#if canImport(Darwin)
    import Darwin
#elseif canImport(Glibc)
    import Glibc
#endif

/// Write a file so that it is there whole or not at all.
///
/// A link at `url` stays one. On a failure `url` is as it was and nothing lies beside it; a kill may
/// leave the file beside it, which the next attempt replaces. Who writes the same file meanwhile
/// waits for its turn.
///
/// - Parameters:
///   - suffix: how the name ends under which it is written at first, since some writers go by it.
///   - write: writes to the name that it is given.
/// - Throws: `ApertusError` of kind `resource`, which names the file: it cannot be written.
package func writeWhole(_ url: URL, suffix: String = "", _ write: (URL) throws -> Void) throws {
    let target = url.resolvingSymlinksInPath()
    func failure(_ reason: String) -> ApertusError {
        ApertusError(.resource, "\(url.filePath): cannot be written (\(reason))")
    }
    var status = stat()
    if stat(target.filePath, &status) == 0, status.st_mode & S_IFMT != S_IFREG {
        throw failure("it is no file")
    }
    let unfinished = target.deletingLastPathComponent()
        .appendingPathComponent(".\(target.lastPathComponent).unfinished\(suffix)")
    guard let claim = claimed(unfinished.filePath) else {
        throw failure(String(cString: strerror(errno)))
    }
    defer { close(claim) }
    do {
        try write(unfinished)
        guard rename(unfinished.filePath, target.filePath) == 0 else {
            throw failure(String(cString: strerror(errno)))
        }
    } catch {
        unlink(unfinished.filePath)
        if error is ApertusError { throw error }
        let words = "\(error)".split(whereSeparator: \.isNewline).joined(separator: " ")
        throw failure(String(words.prefix(200)))
    }
}

/// Make the file at `path`, empty and locked.
///
/// - Returns: what holds the lock; nil with `errno`, where it cannot be made.
private func claimed(_ path: String) -> Int32? {
    while true {
        var there = stat()
        // Whatever else has that name is not written through.
        if lstat(path, &there) == 0, there.st_mode & S_IFMT != S_IFREG { unlink(path) }
        let claim = open(path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0o666)
        guard claim >= 0 else { return nil }
        // Not every file system knows locks; then writers are not kept apart.
        while flock(claim, LOCK_EX) != 0, errno == EINTR {}
        var mine = stat()
        // Who had it before has renamed or removed it.
        if fstat(claim, &mine) == 0, lstat(path, &there) == 0, mine.st_ino == there.st_ino {
            ftruncate(claim, 0)
            return claim
        }
        close(claim)
    }
}
