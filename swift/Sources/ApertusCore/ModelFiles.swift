import Foundation

/// The one door to files of a model folder, which may come from a stranger.
///
/// A link in it may lead to a private file, a FIFO never ends, a device does things when it is
/// opened. So every file is looked at before it is opened; what is no regular file is refused.
package final class ModelFile {
    /// More than the weights of any Apertus, in one file.
    package static let mostWeights = 1 << 40
    /// No JSON file of a model but its tokenizer has more bytes.
    package static let mostText = 16 << 20
    package static let mostTokenizer = 128 << 20

    /// What error messages call it.
    package let path: String
    /// Of the whole file, in bytes.
    package let size: Int
    private let descriptor: Int32

    /// Open a file for reading.
    ///
    /// - Throws: `ApertusError` that names it: it is missing, no regular file, of more than `limit`
    ///   bytes, or a link to what lies neither in its folder nor in the blobs of a Hub cache.
    package init(_ url: URL, atMost limit: Int = mostWeights) throws {
        path = url.filePath
        let real = try Self.realPath(path)
        let folder = try Self.realPath(url.deletingLastPathComponent().filePath)
        let inside = real.hasPrefix(folder.hasSuffix("/") ? folder : folder + "/")
        guard inside || Self.isHubBlob(real) else {
            throw ApertusError(.rejected, "\(path): links to a file outside the model folder")
        }
        // What was looked at may have been exchanged: neither follow a link nor wait for a FIFO.
        let opened = open(real, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)
        guard opened >= 0 else { throw Self.unreadable(path, errno) }
        var status = stat()
        let isRegular = fstat(opened, &status) == 0 && status.st_mode & S_IFMT == S_IFREG
        // From here on, `deinit` closes it.
        (descriptor, size) = (opened, Int(status.st_size))
        guard isRegular else { throw ApertusError(.rejected, "\(path): is not a regular file") }
        guard size <= limit else {
            throw ApertusError(
                .rejected, "\(path): \(size) bytes is too large; at most \(limit) are read")
        }
    }

    deinit { close(descriptor) }

    /// The bytes from `offset` on, as many as `count`.
    ///
    /// - Throws: `ApertusError`, also if the file ends sooner.
    package func read(at offset: Int = 0, count: Int) throws -> Data {
        guard offset >= 0, count >= 0, count <= size, offset <= size - count else {
            throw ApertusError(.rejected, "\(path): ends too soon; fetch the file again")
        }
        var data = Data(count: count)
        var done = 0
        while done < count {
            let got = data.withUnsafeMutableBytes { buffer in
                pread(descriptor, buffer.baseAddress! + done, count - done, off_t(offset + done))
            }
            if got < 0, errno == EINTR { continue }
            guard got >= 0 else { throw Self.unreadable(path, errno) }
            guard got > 0 else {
                throw ApertusError(.rejected, "\(path): became shorter while it was read; start again")
            }
            done += got
        }
        return data
    }

    /// Whether a folder has anything of that name: a broken link and a FIFO count, too.
    package static func exists(_ url: URL) -> Bool {
        var status = stat()
        return lstat(url.filePath, &status) == 0
    }

    /// Whether a name that a checkpoint gives stays inside its folder on every system.
    package static func isPlainName(_ name: String) -> Bool {
        let printable = name.unicodeScalars.allSatisfy { scalar in
            switch scalar.properties.generalCategory {
            case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator,
                .paragraphSeparator:
                false
            case .spaceSeparator: scalar == " "
            default: !"/\\:".unicodeScalars.contains(scalar)
            }
        }
        return printable && !name.utf8.starts(with: ".".utf8) && (1 ... 255).contains(name.utf8.count)
    }

    /// The names of what lies in `folder`, in order.
    ///
    /// - Throws: `ApertusError` if there is no such folder.
    package static func names(in folder: URL) throws -> [String] {
        try requireFolder(folder)
        guard let names = try? FileManager.default.contentsOfDirectory(atPath: folder.filePath) else {
            throw ApertusError(.rejected, "\(folder.filePath): cannot be read")
        }
        return names.sorted { $0.utf8.lexicographicallyPrecedes($1.utf8) }
    }

    package static func requireFolder(_ folder: URL) throws {
        var status = stat()
        guard stat(folder.filePath, &status) == 0, status.st_mode & S_IFMT == S_IFDIR else {
            throw ApertusError(.notFound, "\(folder.filePath): no such folder")
        }
    }

    /// Refuse what Git LFS leaves in place of a file that begins with `start`.
    package static func refusePointer(_ start: Data, _ path: String) throws {
        if start.starts(with: "version https://git-lfs".utf8) {
            throw ApertusError(
                .rejected, "\(path): is a Git LFS pointer, not the file; run `git lfs pull`")
        }
    }

    private static func realPath(_ path: String) throws -> String {
        guard let found = realpath(path, nil) else {
            let error = errno
            var status = stat()
            if lstat(path, &status) == 0, status.st_mode & S_IFMT == S_IFLNK {
                throw ApertusError(.rejected, "\(path): is a broken link; fetch the checkpoint again")
            }
            if error == ENOENT {
                throw ApertusError(.rejected, "\(path): is missing; fetch the checkpoint again")
            }
            throw unreadable(path, error)
        }
        defer { free(found) }
        return String(cString: found)
    }

    /// Whether a file lies where the Hub client keeps contents: `models--.../blobs/HASH`.
    private static func isHubBlob(_ real: String) -> Bool {
        let parts = real.split(separator: "/")
        return parts.count > 2 && parts[parts.count - 2] == "blobs"
            && parts[parts.count - 3].hasPrefix("models--")
    }

    private static func unreadable(_ path: String, _ error: Int32) -> ApertusError {
        ApertusError(.rejected, "\(path): cannot be read (\(String(cString: strerror(error))))")
    }
}

extension URL {
    /// The path as the system's calls take it.
    package var filePath: String {
        withUnsafeFileSystemRepresentation { $0.map { String(cString: $0) } } ?? path
    }
}

/// All of a file of a model folder.
///
/// - Throws: `ApertusError` that names it: see `ModelFile`; or it is what Git LFS leaves in its place.
package func readFile(_ url: URL, atMost limit: Int) throws -> Data {
    let file = try ModelFile(url, atMost: limit)
    let data = try file.read(count: file.size)
    try ModelFile.refusePointer(data, file.path)
    return data
}

/// The JSON object in a file of a model folder.
///
/// - Throws: `ApertusError` that names the file.
package func readObject(_ url: URL) throws -> JSON {
    try parseObject(readFile(url, atMost: ModelFile.mostText), name: url.filePath)
}

/// The JSON object in `data`: UTF-8, unique keys, no NaN; a byte order mark is accepted.
///
/// - Parameter name: what error messages call it.
package func parseObject(_ data: Data, name: String) throws -> JSON {
    try ModelFile.refusePointer(data, name)
    let bytes = data.starts(with: [0xEF, 0xBB, 0xBF]) ? data.dropFirst(3) : data
    if bytes.allSatisfy({ [0x20, 0x09, 0x0A, 0x0B, 0x0C, 0x0D].contains($0) }) {
        throw ApertusError(.rejected, "\(name): is empty")
    }
    let value: JSON
    do {
        value = try JSON(bytes)
    } catch {
        let problem =
            error.reason == JSON.tooDeep
            ? "is nested too deeply"
            : String(validating: bytes, as: UTF8.self) == nil
                ? "is not UTF-8 text" : "is not valid JSON (\(error))"
        throw ApertusError(.rejected, "\(name): \(problem)")
    }
    guard value.members != nil else {
        throw ApertusError(.rejected, "\(name): expected a JSON object")
    }
    return value
}
